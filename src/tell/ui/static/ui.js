// What htmx does not do: uploads, copying, answers as they stream.
"use strict";
const drop = document.getElementById("drop");

async function upload([file]) {
  if (!file) return;
  const said = document.getElementById("uploading");
  said.textContent = "Copying " + file.name + " …";
  try {
    const found = await (await fetch("/upload/" + encodeURIComponent(file.name), { method: "PUT", body: file })).json();
    if (found.error) said.textContent = found.error;
    else location.href = "/data?data=" + encodeURIComponent(found.path);
  } catch { said.textContent = "The file could not be copied: the page's server does not answer, or refused it."; }
}

if (drop) {
  for (const kind of ["dragover", "dragleave", "drop"])
    document.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.toggle("over", kind === "dragover"); });
  document.addEventListener("drop", (event) => upload(event.dataTransfer.files));
  document.getElementById("file").addEventListener("change", (event) => upload(event.target.files));
}

document.addEventListener("click", ({ target }) => {
  const copy = target.closest("[data-copy]"), suggestion = target.closest("[data-try]");
  if (copy) navigator.clipboard.writeText(copy.dataset.copy).then(() => { copy.textContent = "Copied"; });
  if (suggestion) document.querySelector(".say textarea").value = suggestion.dataset.try;
});

document.addEventListener("submit", async (event) => {
  if (!event.target.matches("form.say")) return;
  event.preventDefault();
  const form = event.target, button = form.querySelector("button");
  button.disabled = true;
  await Promise.all([...document.querySelectorAll("[data-at]")].map((column) => ask(form, column)));
  button.disabled = false;
});

async function ask(form, column) {
  const text = column.querySelector(".text"), line = column.querySelector(".verdict-line");
  const show = ({ end, ok }) => {
    line.textContent = ({ true: "✓ ", false: "✗ " }[ok] || "") + end;
    line.className = "verdict-line " + ({ true: "yes", false: "no" }[ok] || "");
  };
  text.textContent = "";
  show({ end: "…" });
  try {
    const answer = await fetch(form.action + "?at=" + column.dataset.at, { method: "POST", body: form.prompt.value });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "", part; !(part = await reader.read()).done; ) {
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      for (const event of lines.map(JSON.parse)) { text.textContent += event.text || ""; show(event); }
    }
  } catch { show({ end: "The model does not answer. Load the page again.", ok: false }); }
}
