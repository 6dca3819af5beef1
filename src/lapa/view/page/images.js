// Images that the page is given: dropped, chosen from a file, or one of the examples.
"use strict";
// A file that misses its place would otherwise replace the page.
for (const kind of ["dragover", "drop"]) addEventListener(kind, event => event.preventDefault());

// A place for an image. use: is given the image as a data URL.
function dropZone(name, words, use) {
  const input = make("input", { type: "file", accept: "image/*" }), image = make("img", { alt: "", hidden: true });
  const text = make("span", { textContent: words });
  const zone = make("label", { className: "drop" }, image, make("b", { textContent: name }), text, input);
  input.setAttribute("aria-label", name);
  input.onchange = guarded(async () => {
    const [file] = input.files;
    if (!file) return;
    const address = await read(file);
    text.textContent = file.name;
    zone.show(address);
    // So that the same file can be chosen again.
    input.value = "";
    await use(address);
  });
  zone.show = address => { image.src = address ?? ""; image.hidden = !address; if (!address) text.textContent = words; };
  zone.ondragover = event => { event.preventDefault(); zone.classList.add("over"); };
  zone.ondragleave = () => zone.classList.remove("over");
  zone.ondrop = event => {
    event.preventDefault();
    zone.classList.remove("over");
    if (!event.dataTransfer.files.length) return;
    const one = new DataTransfer();
    one.items.add(event.dataTransfer.files[0]);
    input.files = one.files;
    input.dispatchEvent(new Event("change"));
  };
  return zone;
}
function read(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error(`${file.name}: cannot be read`));
    reader.readAsDataURL(file);
  });
}
function exampleButtons(examples, use) {
  return examples.map((example, number) => {
    const text = `episode ${example.episode}, frame ${example.frame}: ${example.instruction || "(no instruction)"}`;
    const button = make("button", { title: text, onclick: () => use(number) },
      make("img", { src: example.small, alt: text }));
    button.setAttribute("aria-pressed", false);
    return button;
  });
}
function shot(address, caption) {
  return make("figure", {}, make("figcaption", { textContent: caption }), make("img", { src: address, alt: caption }));
}
const heatScale = most => `In the difference black is none, light yellow ${percent(most)} of full brightness or more.`;
// The work of presses, one after the other.
let queue = Promise.resolve();
function queued(work) {
  queue = queue.then(() => { $("error").hidden = true; return work(); }).catch(complain);
  return queue;
}
