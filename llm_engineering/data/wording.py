"""Recognises refusals, unfinished answers, and questions about a text that the prompt lacks, by their words.

The phrases are those of common assistants, in English, German, French, Spanish, Portuguese, Italian, Russian, Chinese
and Japanese. They favour precision: an answer in other words or in another language passes.
"""

from __future__ import annotations

import re
import unicodedata

# Verbs that follow "I cannot" in a refusal. If any verb could follow, "I cannot believe it" would be a refusal.
_DO = (
    r"(?:help\b(?! (?:but|feel|falling|my|wonder|think|notice|laugh|smil))|assist|provide|fulfil|comply|answer (?:that|this|the question|your|any)"
    r"|do (?:that|this|so)\b|generate|create|write|give (?:you|any|advice|medical|legal|financial|specific|an? )|offer"
    r"|engage|support|participate|continue|discuss|recommend|share|access|process|browse|respond|retrieve|estimate|verify|produce|perform|complete"
    r"|promote|condone|encourage|suggest|disclose|facilitate|predict|determine|see (?:images|the|your|any)|view"
    r"|open|play|have|express|feel|experience|make|accurately|translate|tell you|reveal|advise|directly|physically)"
)
_CANNOT = (
    r"(?:can(?:no|['’])t|can not|could(?:n['’]t| not)|(?:am|['’]m) (?:(?:sorry|afraid),? )?(?:not able|unable)(?: to)?"
    r"|(?:am|['’]m) not (?:programmed|designed|allowed|permitted|comfortable|in a position) (?:to|with)|(?:will not|won['’]t)(?: be able to)?"
    r"|must (?:respectfully )?decline(?: to)?|do(?: not|n['’]t) (?:have|possess|feel comfortable))"
)
_SOFTLY = r"(?: (?:simply|currently|really|personally|also|unfortunately|legally|ethically|directly|actually|only))?"
_SORRY = (
    r"(?:(?:i['’]?m|i am|we['’]re)(?: (?:very|so|truly|really|terribly))? (?:sorry|afraid)|sorry|(?:my |i )?(?:sincere )?apolog(?:ies|i[sz]e)"
    r"|unfortunately|regrettably)(?: (?:for (?:the|any) (?:confusion|inconvenience)|to say|about that))?[,.;:]?"
)
_ENGLISH = (
    rf"{_SORRY}(?: but)?,?(?: (?:that|as an ai[^.,]*,))? i{_SOFTLY} ?{_CANNOT}{_SOFTLY} {_DO}",
    rf"{_SORRY}(?: but)?,? (?:as an ai\b|i['’]?(?:m| am) (?:only |just )?an ai\b|(?:this|that|your) (?:request|question|prompt)"
    r" (?:is inappropriate|goes against|violates|cannot be)|it (?:is|would be) (?:not|un|in)[ -]?(?:appropriate|ethical|possible for me)"
    r"|i (?:do not|don['’]t) (?:understand|have (?:access|enough|the ability|information|personal|any)))",
    rf"i{_SOFTLY} ?(?:{_CANNOT})(?<!have)(?<!possess){_SOFTLY} (?!have|make|feel|see|open|play|continue|accurately|experience|express|directly|physically|complete){_DO}",
    r"i (?:do not|don['’]t) (?:have|possess) (?:(?:the )?(?:ability|capability|capacity) to|access to|personal (?:opinions|beliefs|feelings|experiences|preferences)"
    r"|feelings|real[- ]time)",
    r"as an? (?:ai |large )?language model\b,? ?(?:\w+ \w+ \w+,? )?(?:i\b|it (?:is|would)|my\b)",
    r"as an? (?:ai|artificial intelligence|machine learning model|virtual assistant|digital assistant|computer program)"
    r"(?:[ -](?:powered|based))?(?: (?:language )?(?:model|assistant|chat ?bot|program|system|bot))?"
    r"(?: (?:developed|created|trained|made|built) by \w+(?: \w+)?)?,? (?:i|it|my)\b[^\n]{0,120}?"
    r"(?:\b(?:can(?:no|['’])t|can not|unable|not able|not capable|not have|am not|lack|without|don['’]t|do not|won['’]t|never|no personal)\b|['’]m not\b|n['’]t\b)",
    r"i(?:['’]m| am) (?:just |only |merely |simply )?an? (?:ai|artificial intelligence|(?:large )?language model|computer program|machine)\b[^.!?\n]{0,60}?"
    r"(?:\b(?:can(?:no|['’])t|unable|not able|(?:do|am) not|don['’]t|not capable)\b)",
    r"it (?:is|would be) (?:not |un|in)(?:appropriate|ethical) (?:for me )?to (?:provide|generate|create|write|discuss|assist|make|give)",
)
_OTHER_LANGUAGES = (
    # German
    r"(?:es tut mir (?:sehr )?leid|tut mir leid|entschuldigung|ich bedau(?:e)?re),? (?:aber )?(?:das |dabei |hier(?:bei|mit) )?(?:ich kann|kann ich|als ki)",
    r"als (?:eine? )?(?:ki\b|ki-\w+|künstliche intelligenz|(?:großes |ki-)?sprachmodell|ki[- ]assistent)",
    r"leider (?:kann|darf) ich (?:ihnen |dir |diese|das |dabei |keine|hier)[^.!?\n]{0,80}(?:nicht|keine)",
    r"ich kann (?:ihnen |dir )?(?:dabei|damit|bei dieser (?:anfrage|bitte)) (?:leider )?nicht (?:helfen|weiterhelfen)",
    # French
    r"(?:je suis (?:vraiment )?désolée?|désolée?|je regrette|malheureusement)(?: de vous décevoir)?,? (?:mais )?je (?:ne (?:peux|suis|dispose|puis)|n['’]ai pas)",
    r"en tant qu(?:['’]ia\b|['’]intelligence|['’]assistant|e (?:grand )?modèle de lang)",
    r"je ne (?:peux|suis) pas (?:en mesure|capable|vous (?:aider|fournir)|répondre à (?:cette|votre)|fournir)",
    # Spanish
    r"(?:lo siento|lo lamento|perdón|disculpa|lamentablemente)(?: mucho)?,? (?:pero )?no (?:puedo|tengo|estoy|me es posible)",
    r"como (?:un |una )?(?:gran )?(?:modelo de (?:lenguaje|ia|inteligencia)|inteligencia artificial|ia\b|asistente (?:de ia|virtual))",
    r"no puedo (?:ayudar(?:te|le)?|proporcionar|responder a (?:esa|esta)|cumplir|asistir)",
    # Portuguese
    r"(?:desculpe|desculpa|sinto muito|lamento|infelizmente),? (?:mas )?(?:eu )?não (?:posso|consigo|tenho|sou capaz)",
    r"como (?:um |uma )?(?:modelo de linguagem|inteligência artificial|assistente (?:de ia|virtual))",
    # Italian
    r"(?:mi dispiace|spiacente|purtroppo),? (?:ma )?non (?:posso|sono in grado|ho)",
    r"(?:in quanto|come|essendo) (?:un )?(?:modello (?:linguistico|di linguaggio)|intelligenza artificiale|ia\b|assistente (?:ia|virtuale))",
    # Russian
    r"(?:извините|простите|к сожалению|прошу прощения|мне жаль),? (?:но )?(?:,? ?как [^,.]{3,40}, )?я не (?:могу|имею|способ|в состоянии|обладаю)",
    r"(?:как|будучи) (?:ии\b|языковая модель|искусственный интеллект|языковой моделью|искусственным интеллектом|ии-)",
    # Chinese and Japanese
    r"(?:非常|很|十分)?(?:抱歉|对不起|對不起|不好意思|遗憾)[,，。!！ ]*(?:但是?)?[,， ]*(?:作为[^,，。]{0,20}[,，])?我?(?:无法|無法|不能|没有办法|沒有|没有|不可以)",
    r"(?:作为|作為|身为)(?:一个|一個|一名|一款)?(?:ai|人工智能|人工智慧|语言模型|語言模型|大型语言|虚拟助手)",
    r"(?:大変)?(?:申し訳(?:ありません|ございません|ない)|すみません|ごめんなさい)(?:が|けど)?[、。, ]*[^。\n]{0,60}?(?:できません|お答えできかね|ことができない|いたしかね|出来ません)",
    r"(?:私は)?(?:ai|人工知能|言語モデル|ai言語モデル)(?:アシスタント)?(?:として|なので|ですので)",
)
_REFUSAL = re.compile(rf"[\W_]*(?:{'|'.join((*_ENGLISH, *_OTHER_LANGUAGES))})", re.IGNORECASE)
# Characters of an answer that are searched for a refusal. A refusal is at the beginning of an answer.
_OPENING_CHARS = 300


def refusal(answer: str) -> str:
    """The words with which an answer refuses, or with which a machine says that it is unable; empty for other answers.

    Only the beginning counts: an answer that quotes or explains a refusal is no refusal.
    """
    match = _REFUSAL.match(unicodedata.normalize("NFC", answer[:_OPENING_CHARS]))
    return match.group().strip() if match else ""


_FENCE = re.compile(r"^[ \t>]*(`{3,}|~{3,})([^`\n]*)$", re.MULTILINE)
_LIST_ITEM = re.compile(r"\s*(?:[-*•‣·+–—]|\(?(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,4})[.):])\s+")
# Characters of code, tables, formulas, tags and addresses that prose does not contain.
_NOT_PROSE = re.compile(r"[{}<>=|\\;_`#@~]|://|\w\(|\w\.\w|\t")
_NOT_PROSE_LINE = re.compile(r" {4}|\t|[#>|$]")
# A full stop after fewer than three small letters can end an abbreviation: Mr. Smith, e.g. this.
_STOP = re.compile(r"(?:(?<=[^\W\d_A-Z]{3})\.|[!?…])[\"'”’»)\]*]*\s+|[。！？؟।۔]\s*")
_ENDS_WITH_STOP = re.compile(r"[.!?…:。！？؟।۔：][\"'”’»)\]*_」』]*\s*$")
# Text after the last sentence that needs no full stop: a dash (as before an author's name), a label of up to four words
# with a colon, or a letter's closing.
_NO_SENTENCE = re.compile(
    r"[-–—]|(?:\S+\s+){0,3}\S+:(?:\s|$)|(?:best|kind|warm|yours|sincerely|regards|respectfully|thanks|thank you|love|cheers"
    r"|mit freundlichen|viele grüße|liebe grüße|cordialement|bien à vous|atentamente|saludos|atenciosamente|cordiali)\b",
    re.IGNORECASE,
)
# Words that never end a sentence. The search respects case, because the letter A or I can be an answer.
# fmt: off
_NEVER_LAST = frozenset({
    "the", "a", "an", "and", "or", "of", "because", "than", "their", "its", "our", "your", "my", "including", "into", "whose",
    "der", "die", "den", "dem", "ein", "eine", "einen", "und", "oder", "weil", "sowie", "durch", "für",
    "le", "la", "les", "un", "une", "des", "du", "de", "et", "ou", "avec", "qui", "que", "pour",
    "el", "los", "las", "y", "o", "con", "por", "del",
    "il", "lo", "gli", "di", "che", "dei", "della", "um", "uma", "do", "das", "dos", "com", "em",
})
# fmt: on
# A shorter sentence is often a name, a title or a label.
MIN_WORDS = 6
# A shorter last line may be verse. It does not count as cut off only because the line before it ends with a full stop.
MIN_WORDS_OF_A_NEW_PARAGRAPH = 10


def unfinished(answer: str) -> str:
    """Why an answer looks cut off: an open code fence, or prose that ends within a sentence; empty if it looks whole.

    Lists, headings, verse, code, names, numbers and addresses need no full stop. The last line counts as prose if it has
    at least MIN_WORDS words and ends with a comma or a word such as `the`, or has an earlier sentence with a full stop.
    It also counts if it has at least MIN_WORDS_OF_A_NEW_PARAGRAPH words and follows a line that ends with a full stop.
    """
    text = unicodedata.normalize("NFC", answer.rstrip())
    if ("```" in text or "~~~" in text) and _open_fence(text):
        return "a code block is not closed"
    # Every character except a letter and a comma can end an answer: full stops, quotation marks, brackets, emoji, digits.
    comma = text[-1:] in (",", "，", "、", "،")
    if not (comma or text[-1:].isalpha()):
        return ""
    head, _, line = text.rpartition("\n")
    if _NOT_PROSE_LINE.match(line):
        return ""
    item = _LIST_ITEM.match(line)
    line = line[item.end() :] if item else line
    stops = list(_STOP.finditer(line))
    fragment = line[stops[-1].end() :] if stops else line
    words = fragment.split()
    if _NOT_PROSE.search(fragment) or _NO_SENTENCE.match(fragment):
        return ""
    count = len(line.split())
    if count >= MIN_WORDS and (comma or words[-1] in _NEVER_LAST):
        return "ends within a sentence"
    if stops and stops[-1].group()[0] in "。！？":
        return "ends within a sentence" if len(fragment) > 1 and not item else ""
    if stops:
        follows_prose = len(words) > 1 and count >= (MIN_WORDS if not item else 2 * MIN_WORDS)
    else:
        follows_prose = (
            not item and count >= MIN_WORDS_OF_A_NEW_PARAGRAPH and _ENDS_WITH_STOP.search(head[-200:]) is not None
        )
    return "ends within a sentence" if follows_prose else ""


def _open_fence(text: str) -> bool:
    # By CommonMark, a fence of the same kind that is at least as long, with no text after it, closes a fence.
    opening = ""
    for fence, info in _FENCE.findall(text):
        if not opening:
            opening = fence
        elif fence.startswith(opening) and not info.strip():
            opening = ""
    return bool(opening)


_STRONG = r"(?:passage|excerpt|extract)"
_WEAK = r"(?:text|context|paragraph|article|document|snippet|section|story|poem|abstract|transcript|chapter)"
# What follows the noun: the end of the clause, or a word that points at the page. `the text field` is no passage.
CLAUSE_END = r"(?=\s*(?:[?.!,;]|$|(?:above|below|provided|given|mentioned|discussed|described|you|that (?:is|was) (?:given|provided))\b))"
_SAYS = (
    r"(?:say|state|mention|describe|discuss|explain|suggest|imply|refer|mean|tell|argue|claim|conclude|present|emphasi[sz]e|provide"
    r"|focus|talk|indicate|convey|illustrate|define)s?\b"
)
_MENTIONS = (
    rf"\b(?:the|this) {_STRONG}\b(?! (?:of (?:time|years|the|a|this|that|an|bills?|laws?|legislation)\b|(?:from|through|between|across|under|over|into)\b|should|must|needs?|will))",
    rf"\b(?:the|this) (?:above|following|given|provided|preceding|previous|aforementioned|accompanying) (?:{_STRONG}|{_WEAK})\b",
    rf"\b(?:the|this) (?:{_WEAK}|{_STRONG})(?: that (?:is|was))? (?:above|below|provided|given)\b",
    rf"\b(?:according to|based (?:solely |only )?(?:up)?on|as (?:mentioned|described|stated|discussed|explained|defined|given) in|(?:mentioned|described|stated|discussed|explained) in"
    rf"|referred to in|refer(?:ring)? to|(?:author|narrator|speaker|tone|main (?:idea|point|topic|theme|argument|purpose)|purpose|topic|theme|meaning|title|moral|summary|subject) (?:of|in)"
    rf"|given|from|answer from) (?:the|this) {_WEAK}\b{CLAUSE_END}",
    r"\bin the (?:text|paragraph|article|passage|snippet|excerpt|document)(?=\s*(?:[?,]|$|above\b|below\b))",
    rf"\b(?:what|how|why|where|which [^?.]{{1,30}}) (?:does|did|do|is|was) the (?:text|context|paragraph|article|document|snippet|section|author|narrator) {_SAYS}",
    rf"\b(?:summari[sz]e|paraphrase|rewrite|rephrase|translate|proofread|edit|correct|classify|categori[sz]e|analy[sz]e|read|review|shorten|simplify|continue)"
    rf" (?:the|this) (?:{_WEAK}|{_STRONG})\b{CLAUSE_END}",
    # German, French, Spanish, Portuguese, Italian
    r"\b(?:laut|gemäß|im|in dem|aus dem|nach dem|in diesem|des|dem|den|der|das) (?:dem |der |des )?(?:(?:obigen?|obenstehenden?|folgenden?|vorliegenden?|gegebenen?|nachstehenden?) "
    r"(?:text(?:es|s)?|abschnitts?|absatz(?:es)?|auszugs?|artikels?|kontexts?|passage)|textabschnitts?|textauszugs?|textpassage|textstelle)\b",
    r"\b(?:laut|gemäß) (?:dem |diesem |obigem )?(?:text|absatz|auszug|artikel|kontext)\b",
    r"\b(?:laut|gemäß|im|in dem|nach dem|des) (?:text(?:es|s)?|absatz(?:es)?)(?=\s*(?:[?,.]|$|erwähnt|genannt|beschrieben|oben|unten))",
    r"\b(?:selon|d['’]après|dans|de) (?:le |la |l['’]|ce |cet |cette )(?:texte|passage|extrait|paragraphe|article|contexte)(?=\s*(?:[?,.]|$|ci-dessus|ci-dessous|suivant|précédent|fourni|donné))",
    r"\b(?:según|en|del?|sobre) (?:el |la |este |esta )?(?:texto|pasaje|fragmento|párrafo|artículo|contexto|extracto)(?=\s*(?:[?,.]|$|anterior|siguiente|proporcionad|dado|de arriba|de abajo))",
    r"\b(?:segundo|conforme|de acordo com|no|na|do|da) (?:o |a )?(?:texto|passagem|trecho|parágrafo|artigo|contexto|excerto)(?=\s*(?:[?,.]|$|acima|abaixo|seguinte|fornecid|dado))",
    r"\b(?:secondo|nel|nella|del|della|in base al) (?:il |la )?(?:testo|brano|passaggio|paragrafo|articolo|contesto|estratto)(?=\s*(?:[?,.]|$|sopra|sotto|seguente|precedente|fornito))",
    # Chinese and Japanese
    r"(?:根据|依据|按照|基于|阅读|结合)(?:以上|上述|上面|下面|以下|该|这篇|这段|本|所给)?(?:的)?(?:文章|文本|文段|段落|短文|材料|上文|上下文|原文|内容|课文)",
    r"(?:上述|上面的|下面的|这段|这篇|该)(?:文章|文本|文段|段落|短文)|(?<![中作英语论正])文中(?:提到|所|的|说)|上文",
    r"(?:上記|次|以下|この)の?(?:文章|文|テキスト|段落|本文|記事)(?:に|で|は|から|を|の)|本文(?:中|に|で|によ)",
)
_MENTION = re.compile("|".join(_MENTIONS), re.IGNORECASE)
# Every mention contains one of these casefolded strings. A search for them is far quicker, so it comes first.
# fmt: off
_HINTS = (
    "passag", "excerpt", "extract", "text", "context", "paragraph", "article", "document", "snippet", "section", "story", "poem", "abstract", "transcript",
    "chapter", "author", "narrator", "abschnit", "absatz", "auszug", "artikel", "kontext", "extrait", "pasaje", "fragmento", "párrafo", "artículo",
    "trecho", "parágrafo", "artigo", "excerto", "testo", "brano", "paragrafo", "articolo", "contesto", "estratto", "文", "段落", "材料", "内容", "テキスト", "記事",
)
# fmt: on
# Matches a prompt that contains a text: some words after a colon or in quotation marks (in scripts without spaces, some
# characters), a second line, or a code fence.
_CONTAINS_TEXT = re.compile(
    r"[:：]\s*(?:\S+\s+){2}\S|[:：]\s*[^\s\x00-\u2fff]{6}|[\"“«„「‘](?:[^\"”»“」’\s]+\s+){2}|[“«「『][^”»」』]{8}|\n\s*\S|```"
)


def mention_of_passage(prompt: str) -> str:
    """The words with which a prompt mentions a text that it does not contain; empty for all other prompts."""
    mention = mention_of_text(prompt)
    return "" if not mention or _CONTAINS_TEXT.search(prompt.strip()) else mention


def mention_of_text(prompt: str) -> str:
    """The words with which a prompt mentions a text, whether it contains the text or not; empty for all other prompts."""
    prompt = unicodedata.normalize("NFC", prompt)
    folded = prompt.casefold()
    if not any(hint in folded for hint in _HINTS):
        return ""
    match = _MENTION.search(prompt)
    return "" if match is None else match.group().strip()


# What is to be ignored: the prompt of the model that reads the text.
_GIVEN = r"(?:instructions?|prompts?|rules|guidelines|directions|commands|messages?|context|(?:above|previous|preceding) text)"
_TO_A_MODEL = re.compile(
    "|".join(
        (
            rf"\b(?:ignore|disregard|forget|override|bypass)\b(?: \w+){{0,3}}? (?:above|previous|prior|preceding|earlier|foregoing|system|your|all)\b(?: \w+){{0,2}}? {_GIVEN}\b",
            r"\b(?:ignore|disregard|forget) (?:all of |everything )?(?:the )?above\b(?= and\b|[,.;:!]|$)",
            r"\b(?:ignore|disregard|forget) (?:everything|all)(?: (?:that )?(?:you|i) (?:were|was|have been|had been)?)? (?:told|said|above|before)\b",
            r"\b(?:reveal|repeat|print|output|show|leak)(?: me)? (?:your|the) (?:\w+ )?(?:system|hidden|initial|original) (?:instructions?|prompts?)\b",
            r"\byou are now (?:in )?(?:an? |the )?(?:\w+ ){0,3}(?:ai|assistant|chatbot|language model|dan|developer mode|jailbroken)\b",
            r"\b(?:new|updated|real|actual) (?:system )?(?:instructions?|prompt) ?:",
            # German, French, Spanish, Portuguese, Italian
            r"\b(?:ignorier\w*|vergiss|missacht\w*)(?: \w+){0,2}? (?:obigen?|vorherigen?|bisherigen?|vorigen?)(?: \w+)? (?:anweisung\w*|befehl\w*|regeln|eingab\w*)",
            r"\b(?:ignore[zr]?|oublie[zr]?)(?: \w+){0,2}? (?:instructions?|consignes?|règles)(?: \w+)? (?:précédente?s?|ci-dessus|antérieure?s?)",
            r"\b(?:ignora|ignore|olvida|esqueça|dimentica)(?: \w+){0,3}? (?:instrucciones|instruções|istruzioni)(?: \w+)? (?:anteriores|previas|precedenti)",
        )
    ),
    re.IGNORECASE,
)
# Every order contains one of these casefolded strings. A search for them is far quicker, so it comes first.
_ORDER_HINTS = (
    "ignor", "disregard", "forget", "override", "bypass", "prompt", "instruction", "you are now", "vergiss", "missacht", "oublie",
    "olvida", "esqueça", "dimentica",
)  # fmt: skip


def order_to_model(text: str) -> str:
    """The words with which a text gives orders to the model that reads it (prompt injection); empty for other texts.

    Finds the usual forms, such as "ignore the instructions above". A text that quotes one matches too, and no list of
    forms is complete.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    if not any(hint in folded for hint in _ORDER_HINTS):
        return ""
    match = _TO_A_MODEL.search(" ".join(folded.split()))
    return "" if match is None else match.group()


# Marks of turns in the usual chat formats: ChatML, Llama 2 and 3, Gemma, DeepSeek.
_TURN_MARK = re.compile(r"<[|｜][^<>|｜\s]{1,40}[|｜]>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>")


def turn_mark(text: str) -> str:
    """The first mark of a chat format that a text spells, such as `<|im_start|>`; empty for other texts."""
    match = _TURN_MARK.search(text)
    return "" if match is None else match.group()
