// Browsers start no worker from a page that was opened as a file. The theme's search then runs in a hidden frame instead.
class IFrameWorker extends EventTarget {
  constructor(url) {
    super();
    this.frame = document.createElement("iframe");
    this.frame.hidden = true;
    this.loaded = new Promise((resolve) => this.frame.addEventListener("load", resolve));
    this.frame.addEventListener("message", ({ data }) => this.dispatchEvent(new MessageEvent("message", { data })));
    this.frame.srcdoc = `<script>
      postMessage = (data) => frameElement.dispatchEvent(new MessageEvent("message", { data }));
    </script><script src="${url}"></script>`;
    document.body.append(this.frame);
  }

  async postMessage(data) {
    await this.loaded;
    this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
  }
}

if (location.protocol === "file:") window.Worker = IFrameWorker;
