/**
 * The images that go with a prompt: chosen, dropped or pasted; shown as thumbnails that can be removed.
 *
 * A file is sent byte for byte: the server shrinks images as the model needs them, and better than a browser would.
 * What the browser cannot show (TIFF, for one) is sent all the same.
 * Not covered: whether the server takes an image; its message says so.
 */

import { toSize } from "./format.js";

export const MAX_IMAGES = 5;

/** A list item with a thumbnail, for the form and for a card; `release` frees what the browser holds for it. */
export function toThumbnail(file) {
  const item = document.createElement("li");
  const image = document.createElement("img");
  image.alt = file.name;
  image.title = `${file.name}, ${toSize(file.size)}`;
  image.decoding = "async";
  image.src = URL.createObjectURL(file);
  image.addEventListener("error", () => {
    const name = document.createElement("span");
    name.className = "no-preview";
    name.textContent = file.name;
    name.title = image.title;
    image.replaceWith(name);
  });
  item.append(image);
  return { item, release: () => URL.revokeObjectURL(image.src) };
}

/** The file as a data URL; fails when it can no longer be read. */
export function toDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}

/** The files that a paste brings; none where an office program offers a picture of its text beside the text. */
export function pastedFiles(clipboard) {
  const types = [...clipboard.types];
  return types.includes("text/plain") && types.includes("text/html") ? [] : [...clipboard.files];
}

export class ImageList {
  #entries = [];
  #list;
  #input;
  #zone;
  #title;
  #say;

  /** `say` is given a message, or an empty one when all is well. */
  constructor({ list, input, zone, title, say }) {
    this.#list = list;
    this.#input = input;
    this.#zone = zone;
    this.#title = title;
    this.#say = say;
    input.addEventListener("change", () => {
      this.add([...input.files]);
      input.value = ""; // the same file may be chosen again
    });
    this.#listenForDrops();
    document.addEventListener("paste", (event) => {
      const files = pastedFiles(event.clipboardData);
      if (!files.length) return;
      event.preventDefault();
      this.add(files);
    });
  }

  get files() {
    return this.#entries.map((entry) => entry.file);
  }

  add(files) {
    const problems = [];
    for (const file of files) {
      if (!file.type.startsWith("image/") || file.type.startsWith("image/svg")) {
        problems.push(`${file.name} is not a photo or picture file.`);
      } else if (file.size === 0) {
        problems.push(`${file.name} is empty.`);
      } else if (this.#entries.length === MAX_IMAGES) {
        problems.push(`${file.name} was left out: ${MAX_IMAGES} images are the most.`);
      } else {
        this.#entries.push(this.#show(file));
      }
    }
    this.#say(problems.join(" "));
    this.#update();
  }

  #show(file) {
    const { item, release } = toThumbnail(file);
    const size = document.createElement("span");
    size.className = "size";
    size.textContent = toSize(file.size);
    const remove = document.createElement("button");
    remove.type = "button";
    remove.className = "remove";
    remove.textContent = "×";
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    const entry = { file, item, release };
    remove.addEventListener("click", () => this.#remove(entry));
    item.append(size, remove);
    this.#list.append(item);
    return entry;
  }

  #remove(entry) {
    const index = this.#entries.indexOf(entry);
    this.#entries.splice(index, 1);
    entry.item.remove();
    entry.release();
    this.#say("");
    this.#update();
    const neighbour = this.#entries[Math.min(index, this.#entries.length - 1)];
    (neighbour?.item.querySelector("button") ?? this.#input).focus();
  }

  #update() {
    const isFull = this.#entries.length === MAX_IMAGES;
    this.#list.hidden = this.#entries.length === 0;
    this.#zone.classList.toggle("compact", this.#entries.length > 0);
    this.#input.disabled = isFull;
    this.#title.textContent = isFull ? `No more than ${MAX_IMAGES} images` : "Add images";
  }

  /** Anywhere on the page: a browser leaves the page for a file that misses a small target. */
  #listenForDrops() {
    let depth = 0; // each element that is crossed sends an enter and a leave
    const mark = (change) => {
      depth = change === 0 ? 0 : Math.max(0, depth + change);
      this.#zone.classList.toggle("over", depth > 0);
    };
    const holdsFiles = (event) => event.dataTransfer.types.includes("Files");
    addEventListener("dragenter", (event) => holdsFiles(event) && mark(1));
    addEventListener("dragleave", (event) => holdsFiles(event) && mark(-1));
    addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault());
    addEventListener("drop", (event) => {
      mark(0);
      if (!holdsFiles(event)) return;
      event.preventDefault();
      this.add([...event.dataTransfer.files]);
    });
  }
}
