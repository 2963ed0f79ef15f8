// What htmx does not do: renewing in place, saying that the server is gone, uploads, copying, answers as they stream.
"use strict";
const find = (selector, within = document) => within.querySelector(selector);
const alertOf = (html) => find("[role=alert]", new DOMParser().parseFromString(html, "text/html"))?.textContent;
const gone = () => "The page's server does not answer; start `tell ui` again." + (find("nav .of") ? " The run itself goes on." : "");

htmx.defineExtension("renew", { // touches only what changed, so that focus, selection and scroll stay
  isInlineSwap: (style) => style === "renew",
  handleSwap: (style, target, { children: [...now] }) => {
    if (style !== "renew") return false;
    if (target.id === now[0].id) return renew(target, now[0]), [target];
    return target.replaceWith(...now), now; // e.g. an answer in place of what said that it is awaited
  },
});
function renew(old, now) {
  if (old.isEqualNode(now)) return;
  if (!old.attributes) return renewText(old, now.data);
  const names = (node) => node.getAttributeNames().filter((name) => name !== "open"); // details are the reader's
  for (const name of names(now)) if (old.getAttribute(name) !== now.getAttribute(name)) old.setAttribute(name, now.getAttribute(name));
  for (const name of names(old)) if (!now.hasAttribute(name)) old.removeAttribute(name);
  let at = old.firstChild;
  for (const child of [...now.childNodes]) {
    let same = at;
    while (same && (same.nodeName !== child.nodeName || same.id !== child.id)) same = same.nextSibling;
    if (same && same === at) at = at.nextSibling;
    else if (same && old.moveBefore) old.moveBefore(same, at);
    else old.insertBefore(same || child, at);
    if (same) renew(same, child);
  }
  while (at) { const gone = at; at = at.nextSibling; gone.remove(); }
}
function renewText(node, text) { // a log grows, and loses its first lines: what is selected of the others stays selected
  for (let from = 0, was = node.data, first = true; first || from; from = was.indexOf("\n", from) + 1, first = false)
    if (text.startsWith(was.slice(from))) return node.deleteData(0, from), node.appendData(text.slice(was.length - from));
  node.data = text;
}
const say = (text, trouble = find("#trouble")) => { if (trouble.textContent !== text) trouble.textContent = text; };
for (const kind of ["htmx:sendError", "htmx:timeout", "htmx:responseError"])
  document.addEventListener(kind, ({ detail }) => (say(alertOf(detail.xhr.responseText) || gone()), find(".busy", detail.target)?.remove()));
document.addEventListener("htmx:afterRequest", ({ detail }) => { if (detail.successful) say(""); });
const note = sessionStorage.getItem("note"); // of the page before
if (note && find("h1")) find("h1").after(Object.assign(document.createElement("p"), { className: "state", role: "status", textContent: note }));
sessionStorage.removeItem("note");
async function upload([file, ...others], said = find("#uploading")) {
  said.textContent = "Copying " + file.name + " …";
  try {
    const { error, path } = await (await fetch("/upload/" + encodeURIComponent(file.name), { method: "PUT", body: file })).json();
    if (error) return said.textContent = error;
    if (others.length) sessionStorage.setItem("note", `One file is taken at a time: ${file.name}, and not ${others.map(({ name }) => name).join(", ")}.`);
    location.href = "/data?data=" + encodeURIComponent(path);
  } catch { said.textContent = "The file could not be copied: the page's server does not answer, or refused it."; }
}
const drop = find("#drop");
for (const kind of drop ? ["dragover", "dragleave", "drop"] : []) document.addEventListener(kind, (event) => {
  event.preventDefault();
  drop.classList.toggle("over", kind === "dragover");
  if (kind === "drop" && event.dataTransfer.files.length) upload(event.dataTransfer.files);
});
drop?.addEventListener("change", (event) => event.target.files.length && upload(event.target.files));
const asked = () => find(".say textarea"), keep = () => sessionStorage.setItem(location.pathname, asked().value); // for a reload
document.addEventListener("htmx:load", () => { if (asked()) asked().value ||= sessionStorage.getItem(location.pathname) || ""; });
document.addEventListener("input", ({ target }) => { if (target === asked()) keep(); });
document.addEventListener("click", ({ target }) => {
  const copy = target.closest("[data-copy]"), suggestion = target.closest("[data-try]");
  if (copy) navigator.clipboard.writeText(copy.dataset.copy).then(() => "Copied", () => {
    getSelection().selectAllChildren(copy.previousElementSibling);
    return "Selected: copy it by the keyboard";
  }).then((said) => { copy.textContent = said; setTimeout(() => { copy.textContent = "Copy"; }, 3000); });
  if (suggestion) { asked().value = suggestion.dataset.try; keep(); }
});
document.addEventListener("submit", async (event) => {
  if (event.target.matches("form.say")) event.preventDefault(); else return;
  const form = event.target, [ask, halt] = form.querySelectorAll("button"), again = find("#again"), asking = new AbortController(), had = document.activeElement === ask;
  halt.onclick = () => asking.abort();
  [ask.disabled, halt.hidden, again.hidden] = [true, false, true];
  if (had) halt.focus(); // a disabled button loses it
  const freed = await Promise.all([...document.querySelectorAll("[data-at]")].map((column) => answer(form, column, asking.signal)));
  if (document.activeElement === halt) form.prompt.focus();
  [ask.disabled, halt.hidden, again.hidden] = [false, true, !freed.some(Boolean)]; // e.g. another tab has freed the model
});
async function answer(form, column, signal, text = find(".text", column), line = find(".verdict-line", column), freed = false) {
  const show = ({ end, ok }) => {
    line.textContent = ({ true: "✓ ", false: "✗ " }[ok] || "") + end;
    line.className = "verdict-line " + ({ true: "yes", false: "no" }[ok] || "");
  };
  show({ end: "…" });
  try {
    text.textContent = "";
    const reply = await fetch(form.action + "?at=" + column.dataset.at, { method: "POST", body: form.prompt.value, signal });
    if (!reply.ok) return show({ end: alertOf(await reply.text()) || gone(), ok: false });
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "", part; !(part = await reader.read()).done; ) {
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      for (const event of lines.map(JSON.parse)) { text.append(event.text || ""); show(event); freed ||= event.gone; }
    }
    return freed;
  } catch (error) { show(error.name === "AbortError" ? { end: "stopped" } : { end: gone(), ok: false }); }
}
