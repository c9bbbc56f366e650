// A blind comparison: shows one question with two answers, and stores each verdict at once.
import { get, onKeys, post, reviewer, root } from "./review.js";

const part = (id) => document.getElementById(id);
const session = part("compare").dataset.session;
const base = `/compare/${session}`;
let current = null;
let busy = false;
let timer;

function show(state) {
  if (!state) return;
  clearTimeout(timer);
  current = state.left === undefined ? null : state.question;
  part("count").textContent = `${state.done} of ${state.total} judged.`;
  const waiting = current === null && state.question !== null;
  const done = state.question === null;
  const sentence = state.progress || (waiting ? "The models answer this question now…" : "");
  const behind = state.answered < state.total ? ` ${state.answered} of ${state.total} questions are answered.` : "";
  part("state").textContent = sentence + behind + (done ? " All questions are judged." : "");
  part("asked").hidden = current === null;
  part("better").hidden = true;
  part("undo").disabled = state.done === 0;
  part("result").hidden = !done;
  for (const name of ["question", "left", "left_cut", "right", "right_cut"]) {
    part(name).textContent = current === null ? "" : name === "question" ? state.prompt : state[name];
  }
  if (waiting) timer = setTimeout(load, 700);
}

async function load() {
  const name = part("reviewer").value.trim();
  if (!name) {
    part("state").textContent = "Enter your name above to begin.";
    return;
  }
  part("result").href = `${root}${base}/result?reviewer=${encodeURIComponent(name)}`;
  show(await get(`${base}/next?reviewer=${encodeURIComponent(name)}`));
}

// One write at a time, so that a key that is held down judges one question.
async function write(path, body) {
  const name = reviewer();
  if (!name || busy) return;
  busy = true;
  try {
    show(await post(`${base}${path}`, { reviewer: name, ...body }));
  } finally {
    busy = false;
  }
}

const judge = (choice, text = "") => current !== null && write("/verdict", { question: current, choice, text });

function startWriting() {
  if (current === null || !reviewer()) return;
  part("better").hidden = false;
  part("text").value = "";
  part("text").focus();
}

const save = () => judge("written", part("text").value);
const undo = () => write("/undo", {});

for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => judge(button.dataset.choice));
}
part("write").addEventListener("click", startWriting);
part("undo").addEventListener("click", undo);
part("cancel").addEventListener("click", () => (part("better").hidden = true));
part("better").addEventListener("submit", (event) => {
  event.preventDefault();
  save();
});
part("text").addEventListener("keydown", (event) => {
  if (event.key === "Escape") part("better").hidden = true;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
});
part("reviewer").addEventListener("change", load);

const left = () => judge("left");
const right = () => judge("right");
onKeys({
  1: left,
  ArrowLeft: left,
  2: right,
  ArrowRight: right,
  0: () => judge("tie"),
  x: () => judge("bad"),
  w: startWriting,
  u: undo,
});
load();
