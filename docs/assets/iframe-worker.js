// Browsers refuse web workers on pages opened from the file system. The search then runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.ready = new Promise((resolve) => this.frame.addEventListener("load", resolve, { once: true }));
      this.frame.addEventListener("reply", (event) =>
        this.dispatchEvent(new MessageEvent("message", { data: event.detail }))
      );
      this.frame.srcdoc =
        "<script>self.postMessage = (data) => frameElement.dispatchEvent(new CustomEvent('reply', { detail: data }));" +
        "self.importScripts = (...urls) => Promise.all(urls.map((url) => new Promise((done) => {" +
        "  const script = document.createElement('script'); script.src = url; script.onload = done;" +
        "  document.head.append(script); })));</script>" +
        `<script src="${new URL(url, location.href)}"></script>`;
      (document.body || document.head).append(this.frame);
    }
    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
