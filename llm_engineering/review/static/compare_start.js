// The form of a new blind comparison.
import { post, root } from "./review.js";

const form = document.getElementById("start");
const own = document.getElementById("own");

form.asked.addEventListener("change", () => (own.hidden = !form.asked.value.startsWith("own")));
document.getElementById("file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  if (file) form.own.value = await file.text();
});

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = form.querySelector("[type=submit]");
  button.disabled = true;
  button.textContent = "Looking up the models…";
  const started = await post("/compare/start", {
    first: form.first.value,
    first_retrieval: form.first_retrieval.checked,
    second: form.second.value,
    second_retrieval: form.second_retrieval.checked,
    asked: form.asked.value,
    count: Number(form.count.value),
    seed: Number(form.seed.value),
    own: form.asked.value.startsWith("own") ? form.own.value.split("\n").filter((line) => line.trim()) : [],
  });
  button.disabled = false;
  button.textContent = "Start";
  if (started) location.href = `${root}/compare/${started.session}`;
});
