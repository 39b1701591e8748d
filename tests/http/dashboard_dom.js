// Runs the dashboard's own script on a page that is just rich enough for it. Reads {script, answers} from stdin: each
// answer is {status, body} of one poll, or null for a node that does not answer. Writes what the page shows after each poll.
"use strict";
const vm = require("node:vm");

class Element {
  constructor(tag) { this.tag = tag; this.children = []; this.className = ""; this.own = ""; this.listeners = {}; this.value = ""; }
  get textContent() { return this.own + this.children.map((child) => child.textContent).join(""); }
  set textContent(text) { this.own = String(text); this.children = []; }
  get classList() {
    const names = () => this.className.split(" ").filter(Boolean);
    return { toggle: (name, on) => { this.className = [...names().filter((each) => each !== name), ...(on ? [name] : [])].join(" "); } };
  }
  appendChild(child) { this.children.push(child); return child; }
  replaceChildren() { this.own = ""; this.children = []; }
  insertRow() { return this.appendChild(new Element("tr")); }
  createTHead() { return this.appendChild(new Element("thead")); }
  createTBody() { return this.appendChild(new Element("tbody")); }
  querySelector(tag) { return this.children.find((child) => child.tag === tag) ?? this.appendChild(new Element(tag)); }
  addEventListener(name, listener) { this.listeners[name] = listener; }
}

function rowsOf(table) {
  return table.children.flatMap((part) => part.children).map((row) => row.children.map((cell) => [cell.textContent, cell.className]));
}

const { script, answers } = JSON.parse(require("node:fs").readFileSync(0, "utf-8"));
const elements = {};
const byId = (id) => (elements[id] ??= new Element(id));
const asked = [];
let next = null;
const page = {
  document: { getElementById: byId, createElement: (tag) => new Element(tag) },
  sessionStorage: { items: {}, getItem(name) { return this.items[name] ?? null; }, setItem(name, value) { this.items[name] = value; } },
  setTimeout: (callback) => { next = callback; },
  fetch: async (url, options) => {
    asked.push([url, options.headers]);
    const answer = answers[asked.length - 1];
    if (!answer) throw new TypeError("Failed to fetch");
    return { ok: answer.status < 400, status: answer.status, json: async () => answer.body };
  },
};

(async () => {
  const shown = [];
  vm.runInNewContext(script, page);
  for (let poll = 0; poll < answers.length; poll += 1) {
    if (poll > 0) { const go = next; next = null; go(); }
    while (next === null) await new Promise(setImmediate);
    const tables = Object.fromEntries(["nodes", "models", "stores"].map((id) => [id, rowsOf(byId(id))]));
    shown.push({ title: byId("title").textContent, state: [byId("state").textContent, byId("state").className], key: byId("key").className, ...tables });
  }
  process.stdout.write(JSON.stringify({ shown, asked }));
})();
