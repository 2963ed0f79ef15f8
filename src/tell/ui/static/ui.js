// What htmx does not do: uploads, copying, frames as high as their page, answers as they stream.
"use strict";

function upload(file) {
  const said = document.getElementById("uploading");
  said.textContent = "Copying " + file.name + " …";
  fetch("/upload/" + encodeURIComponent(file.name), { method: "PUT", body: file })
    .then((answer) => answer.json())
    .then((found) => {
      if (found.error) said.textContent = found.error;
      else location.href = "/data?data=" + encodeURIComponent(found.path);
    })
    .catch(() => { said.textContent = "The file could not be copied: the page's server does not answer, or refused it."; });
}

const drop = document.getElementById("drop");
if (drop) {
  for (const kind of ["dragover", "dragenter"])
    document.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
  document.addEventListener("dragleave", () => drop.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files.length) upload(event.dataTransfer.files[0]);
  });
  document.getElementById("file").addEventListener("change", (event) => {
    if (event.target.files.length) upload(event.target.files[0]);
  });
}

function fit(frame) {
  const page = frame.contentDocument;
  if (page && page.documentElement) frame.style.height = page.documentElement.scrollHeight + 4 + "px";
}
document.addEventListener("load", (event) => { if (event.target.matches && event.target.matches("iframe.fit")) watch(event.target); }, true);
function watch(frame) {
  fit(frame);
  frame.contentDocument.addEventListener("toggle", () => fit(frame), true);
  frame.contentDocument.addEventListener("change", () => fit(frame), true);
}
addEventListener("resize", () => document.querySelectorAll("iframe.fit").forEach(fit));
document.querySelectorAll("iframe.fit").forEach((frame) => {
  if (frame.contentDocument && frame.contentDocument.readyState === "complete" && frame.contentDocument.body.firstChild) watch(frame);
});

document.addEventListener("click", (event) => {
  const copy = event.target.closest("[data-copy]"), suggestion = event.target.closest("[data-try]");
  if (copy) navigator.clipboard.writeText(copy.dataset.copy).then(() => { copy.textContent = "Copied"; });
  if (suggestion) document.querySelector(".say textarea").value = suggestion.dataset.try;
});

document.addEventListener("submit", (event) => {
  if (!event.target.matches("form.say")) return;
  event.preventDefault();
  say(event.target);
});

async function say(form) {
  const button = form.querySelector("button"), said = document.getElementById("said"), columns = {};
  for (const column of document.querySelectorAll("[data-at]")) {
    columns[column.dataset.at] = column;
    column.querySelector(".text").textContent = "";
    const line = column.querySelector(".verdict-line");
    line.textContent = "…";
    line.className = "verdict-line";
  }
  const take = (event) => {
    const column = columns[event.at];
    if (event.text) column.querySelector(".text").textContent += event.text;
    if (event.end === undefined) return;
    const line = column.querySelector(".verdict-line");
    line.textContent = (event.ok === true ? "✓ " : event.ok === false ? "✗ " : "") + event.end;
    line.classList.add(event.ok === true ? "yes" : event.ok === false ? "no" : "plain");
  };
  button.disabled = true;
  said.textContent = "";
  try {
    const answer = await fetch(form.action, { method: "POST", body: new URLSearchParams(new FormData(form)) });
    if (!answer.ok) throw new Error();
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) take(JSON.parse(line));
    }
  } catch {
    said.textContent = "The model does not answer. Load the page again.";
  }
  button.disabled = false;
}
