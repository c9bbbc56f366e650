// What every page of the review needs: the reviewer's name, writes, notices and keys. No text is ever inserted as HTML.

const meta = (name) => document.querySelector(`meta[name="${name}"]`).content;
export const root = meta("root");
const nameField = document.getElementById("reviewer");
const noticeBox = document.getElementById("notice");
const help = document.getElementById("help");

// Each browser tab has its own reviewer, so that two people can share a browser. A new tab begins with the last name.
nameField.value = sessionStorage.getItem("reviewer") ?? localStorage.getItem("reviewer") ?? "";
nameField.addEventListener("input", () => {
  sessionStorage.setItem("reviewer", nameField.value);
  localStorage.setItem("reviewer", nameField.value);
});

// The reviewer's name. Empty if it is missing: the field then has the focus, and a notice says so.
export function reviewer() {
  const name = nameField.value.trim();
  sessionStorage.setItem("reviewer", name);
  if (!name) {
    notice("Enter your name first: it is stored with each decision.", "bad");
    nameField.focus();
  }
  return name;
}

let timer;
// Show a sentence at the bottom of the window for some seconds. `kind` is "good" or "bad".
export function notice(sentence, kind = "good") {
  noticeBox.textContent = sentence;
  noticeBox.className = kind;
  noticeBox.hidden = false;
  clearTimeout(timer);
  timer = setTimeout(() => (noticeBox.hidden = true), kind === "bad" ? 12000 : 4000);
}

// Get JSON from a path below the root. Returns undefined after an error, which a notice shows.
export const get = (path) => answer(fetch(root + path));

// Post a JSON object to a path below the root. Returns the JSON of the answer, or undefined after an error, which a notice shows.
export const post = (path, body) =>
  answer(
    fetch(root + path, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Review-Write": meta("write-secret") },
      body: JSON.stringify(body),
    }),
  );

async function answer(request) {
  let response;
  try {
    response = await request;
  } catch {
    notice("The server does not answer, so nothing was saved. Start `make review` again and open the address that it prints.", "bad");
    return undefined;
  }
  const text = await response.text();
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    value = { error: text };
  }
  if (response.ok) return value;
  notice(value.error, "bad");
  return undefined;
}

// Call a function for a key, unless somebody types text. `actions` maps keys, e.g. "j" or "ArrowDown", to functions.
export function onKeys(actions) {
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input:not([type=checkbox]), textarea, select, dialog[open]");
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !(event.key in actions)) return;
    event.preventDefault();
    actions[event.key](event);
  });
}

onKeys({ "?": () => help.showModal() });
for (const button of document.querySelectorAll("[data-help]")) button.addEventListener("click", () => help.showModal());
help.addEventListener("keydown", (event) => event.key === "?" && help.close());
// Escape leaves a field, so that the keys work again.
document.addEventListener("keydown", (event) => event.key === "Escape" && event.target.matches("header input, [type=search]") && event.target.blur());
