// Decisions on rows: keys, forms, and what other reviewers decide meanwhile.
import { get, notice, onKeys, post, reviewer, root } from "./review.js";

const POLL_MS = 4000;
const list = document.getElementById("rows");
const cards = () => [...list.querySelectorAll("article.row")];
const link = (rel) => document.querySelector(`a[rel=${rel}]`);
let current = cards()[0];
let seen = Number(list.dataset.seen);

function select(card, scroll = true) {
  if (!card) return;
  current?.classList.remove("current");
  current = card;
  card.classList.add("current");
  if (scroll) {
    card.focus({ preventScroll: true });
    card.scrollIntoView({ block: "nearest" });
  }
}

function move(step) {
  const all = cards();
  const next = all[all.indexOf(current) + step];
  // The row of a page of its own, or the last one of a list: go to the next page.
  if (next) select(next);
  else link(step > 0 ? "next" : "prev")?.click();
}

// The server renders a card with all its text escaped. Only such parts of pages are parsed as HTML.
async function part(path) {
  const response = await fetch(root + path).catch(() => undefined);
  if (!response?.ok) {
    notice("The server does not answer. Start `make review` again and open the address that it prints.", "bad");
    return undefined;
  }
  return new DOMParser().parseFromString(await response.text(), "text/html").body.childNodes;
}

async function refresh(card, whole = false) {
  const nodes = await part(`${card.dataset.path}/card?whole=${whole}`);
  if (!nodes) return card;
  const fresh = [...nodes].find((node) => node.nodeName === "ARTICLE");
  const inside = card.contains(document.activeElement);
  card.replaceWith(fresh);
  if (card === current) select(fresh, inside);
  return fresh;
}

// After a decision: the number of decisions, the history of the row, and its tokens if they are shown.
async function renew() {
  const response = await fetch(location.href);
  const page = new DOMParser().parseFromString(await response.text(), "text/html");
  for (const id of ["decided", "history"]) document.getElementById(id)?.replaceWith(page.getElementById(id));
  if (tokens?.open) loadTokens();
  else if (tokens) delete tokens.dataset.loaded;
}

async function decide(card, body) {
  const name = reviewer();
  if (!name) return;
  const answer = await post(`${card.dataset.path}/decision`, { id: card.dataset.id, reviewer: name, seen, ...body });
  if (!answer) return;
  notice(answer.said);
  card.querySelectorAll("form").forEach((form) => form.classList.contains("edit") ? form.remove() : (form.hidden = true));
  const fresh = await refresh(card);
  renew();
  if (card !== current && fresh !== current) return;
  if (body.action !== "undo" && link("up") === null) move(1);
}

const actions = {
  accept: (card) => decide(card, { action: "accept" }),
  undo: (card) => card.querySelector("[data-action=undo]") && decide(card, { action: "undo" }),
  drop(card) {
    const form = card.querySelector("form.drop");
    if (!form || !reviewer()) return;
    form.hidden = false;
    form.elements.reason.focus();
  },
  async edit(card) {
    if (!card.querySelector("footer") || !reviewer()) return;
    if (!card.querySelector("form.edit")) {
      const nodes = await part(`${card.dataset.path}/edit`);
      if (!nodes) return;
      card.querySelector("footer").after(...nodes);
      for (const area of card.querySelectorAll("form.edit textarea")) area.style.height = `${Math.min(area.scrollHeight + 4, 480)}px`;
    }
    const areas = card.querySelectorAll("form.edit textarea");
    areas[areas.length - 1].focus();
  },
};

function close(card) {
  card.querySelector("form.edit")?.remove();
  const drop = card.querySelector("form.drop");
  if (drop) drop.hidden = true;
  card.focus();
}

list.addEventListener("click", async (event) => {
  const card = event.target.closest("article.row");
  if (!card) return;
  select(card, false);
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.action) actions[button.dataset.action](card);
  if ("close" in button.dataset) close(card);
  if ("whole" in button.dataset) refresh(card, true);
});

list.addEventListener("focusin", (event) => select(event.target.closest("article.row"), false));

list.addEventListener("submit", (event) => {
  event.preventDefault();
  const form = event.target;
  const card = form.closest("article.row");
  if (form.classList.contains("drop")) {
    decide(card, { action: "drop", reason: form.elements.reason.value });
    return;
  }
  // Only what was changed is sent: a form field cannot hold every character of the other texts.
  const texts = {};
  for (const field of form.querySelectorAll("textarea")) if (field.value !== field.defaultValue) texts[field.name] = field.value;
  for (const field of form.querySelectorAll("select")) if (!field.selectedOptions[0].defaultSelected) texts[field.name] = field.value;
  decide(card, { action: "edit", texts });
});

list.addEventListener("keydown", (event) => {
  const card = event.target.closest("article.row");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.matches("textarea")) event.target.form.requestSubmit();
  if (event.key === "Escape" && event.target.closest("form")) {
    event.stopPropagation();
    close(card);
  }
});

const onCurrent = (action) => () => current && actions[action](current);
onKeys({
  j: () => move(1),
  k: () => move(-1),
  a: onCurrent("accept"),
  e: onCurrent("edit"),
  d: onCurrent("drop"),
  u: onCurrent("undo"),
  t: () => document.querySelector("#tokens > summary")?.click(),
  "/": () => document.querySelector("#filter [type=search]")?.focus(),
  Enter: (event) => (event.target.closest("button, a, summary") ? event.target.click() : current?.querySelector("a.open").click()),
  Escape: () => link("up")?.click(),
});

const tokens = document.getElementById("tokens");
async function loadTokens() {
  const nodes = await part(tokens.dataset.path);
  if (!nodes) return;
  tokens.dataset.loaded = "yes";
  tokens.querySelector("div").replaceChildren(...nodes);
}
tokens?.addEventListener("toggle", () => tokens.open && !tokens.dataset.loaded && loadTokens());

document.getElementById("save")?.addEventListener("click", async (event) => {
  const answer = await post(event.target.dataset.path, {});
  if (answer) notice(answer.said);
});

// What others decided since this page was made. A card with an open form is not replaced: its reviewer is told.
async function poll() {
  if (document.hidden) return;
  const news = await get(`/data/decided?since=${seen}`);
  if (!news) return;
  const mine = document.getElementById("reviewer").value.trim();
  for (const decision of news.decisions.filter((one) => one.reviewer !== mine)) {
    for (let card of cards().filter((one) => one.dataset.id === decision.id)) {
      if (!card.querySelector("form.edit, form.drop:not([hidden])")) card = await refresh(card);
      const box = card.querySelector(".meanwhile");
      box.textContent = `${decision.said} The last decision counts.`;
      box.hidden = false;
    }
  }
  seen = news.count;
}
setInterval(poll, POLL_MS);

// Show the passage in the middle of its document.
const mark = document.querySelector(".document mark");
if (mark) mark.parentElement.scrollTop = mark.offsetTop - mark.parentElement.offsetTop - mark.parentElement.clientHeight / 3;
select(current, false);
