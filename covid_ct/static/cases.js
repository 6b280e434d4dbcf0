// The reading room: all cases of a run as a table to filter and sort, the chosen one in the viewer, a note beside it.
// This file stands behind volume_viewer.js in one module and uses its h, asBytes, watchTheme and standalone.
// `reading` is the front end with a kernel behind `model`; `readingAlone` gives it a stand-in that holds everything in the page.
// Colours (Okabe and Ito 2008): blue is right, vermilion is wrong, and a sign says it too.

const ROOM_STYLE = `
.ccr{--bg:#fff;--fg:#1b2026;--dim:#565f6a;--line:#d8dce2;--press:#e6ebf1;--accent:#0a63c2;--right:#0072b2;--wrong:#b34a00;--right-rgb:0,114,178;--wrong-rgb:213,94,0;
 box-sizing:border-box;container-type:inline-size;background:var(--bg);color:var(--fg);font:13px/1.4 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums;text-align:left;border:1px solid var(--line);border-radius:8px;padding:10px}
.ccr[data-theme=dark]{--bg:#0f1215;--fg:#dde1e6;--dim:#9aa4b0;--line:#30363e;--press:#262c34;--accent:#78b7ff;--right:#56b4e9;--wrong:#ff9a4d;--right-rgb:56,140,200;--wrong-rgb:213,94,0}
.ccr *{box-sizing:border-box}
.ccr button,.ccr input,.ccr textarea{font:inherit;color:inherit;background:transparent;border:1px solid var(--line);border-radius:6px;margin:0}
.ccr button{cursor:pointer;padding:3px 9px}
.ccr button:hover:not(:disabled){background:var(--press)}
.ccr button:disabled{opacity:.45;cursor:default}
.ccr :is(.ccr-chips,.ccr-kinds) button[aria-pressed=true]{background:var(--press);border-color:var(--accent);box-shadow:inset 0 0 0 1px var(--accent)}
.ccr :is(button,input,textarea,tr,svg):focus-visible{outline:2px solid var(--accent);outline-offset:1px}
.ccr-top,.ccr-chips{display:flex;flex-wrap:wrap;align-items:center;gap:6px 10px;margin-bottom:8px}
.ccr-top h2{font-size:15px;font-weight:650;margin:0!important;padding:0;border:0;flex:1 1 200px;overflow-wrap:anywhere}
.ccr-top input{padding:3px 8px;width:190px}
.ccr-chips{gap:6px}
.ccr-count{color:var(--dim)}
.ccr-main{display:grid;grid-template-columns:minmax(0,1fr) 300px;gap:12px}
.ccr-list{overflow:auto;height:0;min-height:max(400px,100%);border:1px solid var(--line);border-radius:6px}
.ccr table{border-collapse:separate!important;border-spacing:0;margin:0!important;font:inherit!important;color:inherit;border:0!important}
.ccr-list table{width:100%}
.ccr tr{background:transparent!important}
.ccr th,.ccr td{padding:3px 5px;text-align:right!important;white-space:nowrap;border:0!important;color:inherit;max-width:none}
.ccr-list td{border-bottom:1px solid var(--line)!important}
.ccr-list thead th{position:sticky;top:0;z-index:1;background:var(--bg);box-shadow:0 1px var(--line);font-weight:600;vertical-align:bottom}
.ccr-list :is(th,td).ccr-text{text-align:left!important}
.ccr-list th button{border:0;padding:3px 0;font-weight:600;white-space:normal;text-align:inherit;line-height:1.2}
.ccr-list th[aria-sort=ascending] button::after{content:"\\a0▲";font-size:9px}
.ccr-list th[aria-sort=descending] button::after{content:"\\a0▼";font-size:9px}
.ccr-list tbody tr{cursor:pointer}
.ccr-list tbody tr:hover td{background:var(--press)}
.ccr-list tbody tr[aria-selected=true] td{background:var(--press);box-shadow:inset 0 1px var(--accent),inset 0 -1px var(--accent)}
.ccr-list tr:focus-visible{outline-offset:-2px}
.ccr-thumb{display:block;width:48px;height:48px;border:1px dashed var(--line);border-radius:3px;background-repeat:no-repeat}
.ccr-list td.ccr-id{max-width:150px;overflow:hidden;text-overflow:ellipsis}
.ccr .ccr-right{color:var(--right)}.ccr .ccr-wrong{color:var(--wrong);font-weight:600}
.ccr-side{display:flex;flex-direction:column;gap:12px;min-width:0}
.ccr-box{border:1px solid var(--line);border-radius:6px;padding:8px 10px}
.ccr-box h3{font-size:12.5px;font-weight:600;margin:0 0 5px!important;padding:0;border:0}
.ccr-box p{margin:0;color:var(--dim)}
.ccr-matrix{width:100%;table-layout:fixed}
.ccr-matrix th{font-weight:400;color:var(--dim);text-align:center!important;padding:1px 2px;overflow:hidden;text-overflow:ellipsis}
.ccr-matrix td{padding:1px!important}
.ccr-matrix button{width:100%;height:34px;padding:0;border-color:transparent;font-weight:600}
.ccr-matrix button[aria-pressed=true]{outline:3px solid var(--accent);outline-offset:-1px}
.ccr-roc{display:block;width:100%;aspect-ratio:260/150;cursor:pointer}
.ccr-roc text{fill:var(--dim);font-size:11px}
.ccr-kinds{display:flex;flex-wrap:wrap;gap:4px;margin-top:4px}
.ccr-kinds button{padding:2px 6px}
.ccr-side input[type=range]{width:100%;accent-color:var(--accent);padding:0;border:0}
.ccr-case{margin-top:12px;border-top:1px solid var(--line);padding-top:10px}
.ccr-head{display:flex;flex-wrap:wrap;gap:6px 12px;align-items:center;margin-bottom:8px}
.ccr-head h3{font-size:14px;font-weight:650;margin:0!important;padding:0;border:0}
.ccr-head span{flex:1 1 260px}
.ccr-work{display:grid;grid-template-columns:minmax(0,1fr);gap:10px}
.ccr-note textarea{width:100%;min-height:64px;padding:6px 8px;resize:vertical;display:block;margin-bottom:6px}
.ccr-note .ccr-row{display:flex;flex-wrap:wrap;gap:6px;align-items:center}
.ccr-note p{white-space:pre-wrap;overflow-wrap:anywhere}
.ccr-probs{display:grid;grid-template-columns:auto 1fr auto;gap:2px 8px;align-items:center}
.ccr-probs i{height:8px;border-radius:4px;background:var(--press);position:relative;overflow:hidden}
.ccr-probs i::before{content:"";position:absolute;inset:0 auto 0 0;width:var(--p);background:var(--dim)}
.ccr-say{padding:24px 12px;color:var(--dim);text-align:center;border:1px dashed var(--line);border-radius:6px}
.ccr-aside{display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:10px;align-items:start}
.ccr-big{width:192px;height:192px;margin:0 auto 10px}
.ccr [hidden]{display:none!important}
@container (min-width:1500px){.ccr-main{grid-template-columns:minmax(0,1fr) 620px}.ccr-side{display:grid;grid-template-columns:1fr 1fr;align-items:start}.ccr-work{grid-template-columns:minmax(0,1fr) 320px}.ccr-aside{grid-template-columns:1fr;align-content:start}.ccr-matrix button{height:52px}}
@container (max-width:860px){.ccr-main{grid-template-columns:minmax(0,1fr)}.ccr-list{min-height:0;height:320px}.ccr-side{display:grid;grid-template-columns:repeat(auto-fit,minmax(240px,1fr))}}
`;
const CHUNK = 60;                                 // rows that are made at once; more follow as the list is scrolled
const THUMB = [48, 48];                           // css pixels

function svgOf(tag, props, ...kids) {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [k, v] of Object.entries(props)) e.setAttribute(k, v);
  e.append(...kids);
  return e;
}

function compareCases(key, down) {                // numbers by size, text by alphabet, what is missing last
  return (a, b) => {
    const [x, y] = [a[key], b[key]], none = (v) => v === null || v === undefined;
    if (none(x) || none(y)) return none(x) - none(y) || a.at - b.at;
    return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1) || a.at - b.at;
  };
}

function sideOf(c, positive, t) {                 // TP, FN, FP or TN at a threshold
  return ["TN", "FP", "FN", "TP"][2 * (c.label === positive) + (c.p >= t)];
}

async function reading({ model, el }) {
  const meta = model.get("meta"), { classes, positive } = meta, state = { show: model.get("show"), text: "", cell: "", roc: -1, kind: "errors", sort: "loss", down: true, chosen: "" };
  const root = h("div", { className: "ccr", role: "group", "aria-label": `Reading room: ${meta.title}` }, h("style", {}, ROOM_STYLE));
  el.classList.add("covid-ct-room");
  el.append(root);
  const unwatch = watchTheme(el.ownerDocument, (t) => { root.dataset.theme = t; });
  const heard = {}, listen = (m, buffers) => { const f = heard[m.kind]; if (f) f(m, buffers || []); };
  model.on("msg:custom", listen);
  const { cases, roc, notes } = await new Promise((done) => { heard.cases = done; model.send({ kind: "want cases" }); });
  const rows = cases.map((c, at) => ({ ...c, at, p: c.prob[classes.indexOf(positive)], note: notes[c.id]?.text ? 1 : null }));
  const byId = Object.fromEntries(rows.map((c) => [c.id, c])), drafts = {};
  let shown = [], made = 0, end = null, sheets = null;

  // -------------------------------------------------------------- above: title, search, filters
  const search = h("input", { type: "search", placeholder: "scan, patient, class", "aria-label": "Search scan, patient or class", data: { control: "search" }, oninput: () => { state.text = search.value; list(); } });
  const count = h("span", { className: "ccr-count", role: "status", data: { role: "count" } });
  const clear = h("button", { type: "button", data: { control: "clear" }, onclick: () => { Object.assign(state, { show: "all", text: "", cell: "", roc: -1 }); search.value = ""; tell(); list(); } }, "Clear filters");
  const chips = Object.entries({ all: "every case of this table", ...meta.filters, noted: "cases with a note" }).map(([name, words]) => h("button", { type: "button", title: words, data: { filter: name }, onclick: () => { state.show = name; tell(); list(); } }));
  root.append(h("div", { className: "ccr-top" }, h("h2", {}, meta.title), count, search, clear), h("div", { className: "ccr-chips", role: "group", "aria-label": "Filters" }, ...chips));
  const tell = () => { model.set("show", state.show); model.save_changes(); };
  const has = (c, name) => name === "all" || (name === "noted" ? Boolean(c.note) : c.flags.includes(name));

  // -------------------------------------------------------------- the list
  const heads = meta.columns.map(({ key, name, words, text }) => h("th", { scope: "col", className: text ? "ccr-text" : "", data: { key } }, h("button", { type: "button", title: words, onclick: () => {
    state.down = state.sort === key ? !state.down : !text; state.sort = key; list(); } }, name)));
  const body = h("tbody"), more = h("tbody", {}, h("tr", {}, h("td", { colSpan: heads.length + 1 }, "…")));
  const table = h("table", { role: "grid", "aria-label": "Cases" }, h("thead", {}, h("tr", {}, h("th", { scope: "col", className: "ccr-text" }, h("span", {}, "slice")), ...heads)), body, more);
  const scroller = h("div", { className: "ccr-list" }, table);
  new IntersectionObserver(([e]) => { if (e.isIntersecting) grow(); }, { root: scroller, rootMargin: "300px" }).observe(more);

  function thumbOf(c, scale = 1) {
    const i = h("i", { className: "ccr-thumb", "aria-hidden": "true" });
    if (sheets && c.thumb !== null) {
      let n = c.thumb, s = 0;
      while (n >= sheets[s].count) n -= sheets[s++].count;
      const { url, cols, count: all } = sheets[s], [w, v] = THUMB.map((x) => x * scale);
      i.style.border = "0";
      i.style.backgroundImage = `url(${url})`;
      i.style.backgroundSize = `${cols * w}px ${Math.ceil(all / cols) * v}px`;
      i.style.backgroundPosition = `${-(n % cols) * w}px ${-Math.floor(n / cols) * v}px`;
    }
    return i;
  }
  function cellOf(c, { key, text, digits, unit }) {
    const v = c[key];
    if (key === "id") return h("td", { className: "ccr-text ccr-id", title: `${v}, patient ${c.patient}${c.note ? `: ${notes[v].text}` : ""}` }, c.note ? `${v} ✎` : v);
    if (key === "predicted") return h("td", { className: `ccr-text ${c.right ? "ccr-right" : "ccr-wrong"}` }, `${c.right ? "✓" : "✗"} ${v}`);
    if (v === null) return h("td", { className: text ? "ccr-text" : "" }, "–");
    return h("td", { className: text ? "ccr-text" : "" }, text ? String(v) : unit === "%" ? `${(100 * v).toFixed(digits)} %` : v.toFixed(digits));
  }
  function rowOf(c) {
    const tr = h("tr", { tabIndex: -1, data: { id: c.id }, "aria-rowindex": c.place + 2, "aria-selected": String(c.id === state.chosen), onclick: () => open(c.id), onkeydown: (e) => {
      const go = { ArrowDown: tr.nextElementSibling, ArrowUp: tr.previousElementSibling, Home: body.firstElementChild, End: body.lastElementChild }[e.key];
      if (e.key === "Enter" || e.key === " ") open(c.id); else if (go) focusRow(go); else return;
      e.preventDefault();
    } }, h("td", { className: "ccr-text" }, thumbOf(c)), ...meta.columns.map((col) => cellOf(c, col)));
    return tr;
  }
  function focusRow(tr) {
    body.querySelectorAll("tr[tabindex='0']").forEach((r) => { r.tabIndex = -1; });
    tr.tabIndex = 0;
    tr.focus();
  }
  function grow() {
    body.append(...shown.slice(made, made + CHUNK).map(rowOf));
    made = Math.min(shown.length, made + CHUNK);
    more.hidden = made >= shown.length;
  }
  function list() {
    const words = state.text.toLowerCase().split(/\s+/).filter(Boolean), t = state.roc >= 0 ? roc[state.roc][0] : null;
    const passes = (c) => has(c, state.show) && (!state.cell || state.cell === `${c.label} as ${c.predicted}`) && words.every((w) => c.words.includes(w))
      && (t === null || (state.kind === "errors" ? ["FN", "FP"] : [state.kind]).includes(sideOf(c, positive, t)));
    shown = rows.filter(passes).sort(compareCases(state.sort, state.down));
    shown.forEach((c, i) => { c.place = i; });
    body.replaceChildren(); made = 0; grow();
    if (body.firstElementChild) (body.querySelector(`tr[aria-selected=true]`) || body.firstElementChild).tabIndex = 0;
    table.setAttribute("aria-rowcount", shown.length + 1);
    scroller.scrollTop = 0;
    count.textContent = `${shown.length} of ${rows.length} cases`;
    heads.forEach((th) => th.setAttribute("aria-sort", th.dataset.key === state.sort ? (state.down ? "descending" : "ascending") : "none"));
    chips.forEach((b) => { const n = rows.filter((c) => has(c, b.dataset.filter)).length; b.textContent = `${b.dataset.filter} ${n}`; b.setAttribute("aria-pressed", String(b.dataset.filter === state.show)); });
    clear.disabled = state.show === "all" && !state.text && !state.cell && state.roc < 0;
    matrix.querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.cell === state.cell)));
    drawRoc();
    stepButtons();
    root.dataset.rows = shown.length;
  }

  // -------------------------------------------------------------- confusion matrix and ROC curve
  const matrix = h("table", { className: "ccr-matrix" }, h("thead", {}, h("tr", {}, h("th", {}, "truth ↓"), ...classes.map((c) => h("th", { scope: "col", title: c }, c)))), h("tbody", {}, ...classes.map((truth) => {
    const all = rows.filter((c) => c.label === truth);
    return h("tr", {}, h("th", { scope: "row", title: truth }, truth), ...classes.map((said) => {
      const n = all.filter((c) => c.predicted === said).length, share = n / Math.max(1, all.length), cell = `${truth} as ${said}`;
      const b = h("button", { type: "button", data: { cell }, "aria-label": `${n} ${truth} called ${said}`, onclick: () => { state.cell = state.cell === cell ? "" : cell; list(); } }, String(n));
      b.style.background = `rgba(var(--${truth === said ? "right" : "wrong"}-rgb),${(0.06 + 0.54 * share).toFixed(2)})`;   // pale enough for the text on it
      return h("td", {}, b);
    }));
  })));
  const curve = svgOf("svg", { class: "ccr-roc", viewBox: "0 0 260 150", role: "img" }), rocAt = h("input", { type: "range", min: 0, max: Math.max(0, roc.length - 1), step: 1, "aria-label": `Threshold on the probability of ${positive}`, data: { control: "roc" }, oninput: () => { state.roc = Number(rocAt.value); list(); } });
  const kinds = ["errors", "TP", "FN", "FP", "TN"].map((k) => h("button", { type: "button", data: { kind: k }, onclick: () => { state.kind = k; if (state.roc < 0) state.roc = nearest(0.5); list(); } }));
  const rocSays = h("p", { data: { role: "threshold" } }), nearest = (t) => roc.reduce((best, [x], i) => (Math.abs(x - t) < Math.abs(roc[best][0] - t) ? i : best), 0);
  const X = (f) => 34 + 216 * f, Y = (f) => 120 - 110 * f;
  if (roc.length) {
    curve.append(svgOf("path", { d: `M${X(0)} ${Y(0)}L${X(1)} ${Y(1)}`, stroke: "currentColor", "stroke-dasharray": "3 4", "stroke-opacity": ".35", fill: "none" }),
      svgOf("path", { d: `M${X(0)} ${Y(1)}V${Y(0)}H${X(1)}`, stroke: "currentColor", "stroke-opacity": ".5", fill: "none" }),
      svgOf("path", { d: `M${roc.map(([, f, t]) => `${X(f).toFixed(1)} ${Y(t).toFixed(1)}`).join("L")}`, stroke: "var(--right)", "stroke-width": 2, fill: "none" }),
      svgOf("text", { x: X(0.5), y: 146, "text-anchor": "middle" }, "1 − specificity"), svgOf("text", { x: -Y(0.5), y: 12, transform: "rotate(-90)", "text-anchor": "middle" }, "sensitivity"),
      ...[[X(0), 133, "0"], [X(1), 133, "1"], [24, Y(0) + 4, "0"], [24, Y(1) + 6, "1"]].map(([x, y, s]) => svgOf("text", { x, y, "text-anchor": "middle" }, s)),
      svgOf("circle", { r: 5, fill: "var(--bg)", stroke: "var(--wrong)", "stroke-width": 2.5 }));
    curve.addEventListener("click", (e) => {
      const box = curve.getScreenCTM().inverse(), at = new DOMPoint(e.clientX, e.clientY).matrixTransform(box);
      const far = ([, f, t]) => Math.hypot(X(f) - at.x, Y(t) - at.y);
      state.roc = roc.reduce((best, p, i) => (far(p) < far(roc[best]) ? i : best), 0);
      list();
    });
  }
  function drawRoc() {
    if (!roc.length) return;
    const i = state.roc < 0 ? nearest(0.5) : state.roc, [t, f, s] = roc[i], dot = curve.querySelector("circle"), n = { errors: 0, TP: 0, FN: 0, FP: 0, TN: 0 };
    for (const c of rows) n[sideOf(c, positive, t)]++;
    n.errors = n.FN + n.FP;
    dot.setAttribute("cx", X(f)); dot.setAttribute("cy", Y(s)); dot.setAttribute("opacity", state.roc < 0 ? 0.5 : 1);
    rocAt.value = i;
    rocSays.textContent = `at ${t > 1 ? "no threshold that any case reaches" : `p ≥ ${t.toFixed(3)}`}: sensitivity ${s.toFixed(2)}, specificity ${(1 - f).toFixed(2)}`;
    rocAt.setAttribute("aria-valuetext", rocSays.textContent);
    curve.setAttribute("aria-label", `ROC curve of ${positive} against the rest, ${rocSays.textContent}`);
    kinds.forEach((b) => { b.textContent = `${b.dataset.kind} ${n[b.dataset.kind]}`; b.setAttribute("aria-pressed", String(state.roc >= 0 && b.dataset.kind === state.kind)); });
  }
  const side = h("div", { className: "ccr-side" }, h("section", { className: "ccr-box", "aria-label": "Confusion matrix" }, h("h3", {}, "Confusion matrix: click a cell"), matrix),
    ...(roc.length ? [h("section", { className: "ccr-box", "aria-label": "ROC curve" }, h("h3", {}, `ROC, ${positive}: click a point`), curve, rocAt, rocSays, h("div", { className: "ccr-kinds", role: "group", "aria-label": "Which side of the threshold" }, ...kinds))] : []));
  root.append(h("div", { className: "ccr-main" }, scroller, side));

  // -------------------------------------------------------------- the chosen case
  const title = h("h3", { tabIndex: -1 }), facts = h("span"), work = h("div"), probs = h("div", { className: "ccr-probs" });
  const step = (by) => { const i = shown.findIndex((c) => c.id === state.chosen); open(shown[Math.max(0, Math.min(shown.length - 1, i < 0 ? 0 : i + by))].id); };
  const before = h("button", { type: "button", data: { control: "before" }, onclick: () => step(-1) }, "← previous"), after = h("button", { type: "button", data: { control: "after" }, onclick: () => step(1) }, "next →");
  const noteBox = h("textarea", { "aria-label": "Note on this case", placeholder: "What went wrong here?", readOnly: !meta.saves, data: { control: "note" }, oninput: () => { drafts[state.chosen] = noteBox.value; saying(); } });
  const save = h("button", { type: "button", data: { control: "save" }, onclick: () => send() }, "Save note"), noteSays = h("p", { role: "status", data: { role: "note" } }), choices = h("div", { className: "ccr-row", hidden: true });
  noteBox.addEventListener("keydown", (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) send(); });
  const panel = h("section", { className: "ccr-case", "aria-label": "Chosen case", hidden: true }, h("div", { className: "ccr-head" }, title, facts, before, after),
    h("div", { className: "ccr-work" }, work, h("div", { className: "ccr-aside" }, h("section", { className: "ccr-box", "aria-label": "Probabilities" }, h("h3", {}, "Probabilities"), probs),
      h("section", { className: "ccr-box ccr-note", "aria-label": "Note" }, h("h3", {}, "Note"), noteBox, h("div", { className: "ccr-row" }, ...(meta.saves ? [save] : []), noteSays), choices))));
  root.append(panel);
  root.addEventListener("keydown", (e) => e.stopPropagation());   // no shortcut of the notebook around us

  function stepButtons() {
    const i = shown.findIndex((c) => c.id === state.chosen);
    before.disabled = i <= 0; after.disabled = !shown.length || i === shown.length - 1;
  }
  const when = ({ at }) => `${at.slice(0, 16).replace("T", " ")} UTC`;
  function saying(text) {
    const stored = notes[state.chosen], draft = drafts[state.chosen];
    save.disabled = draft === undefined || draft === (stored?.text || "");
    noteSays.textContent = text || (!meta.saves ? (stored ? `by ${stored.by}, ${when(stored)}` : "Notes are written in JupyterLab; this page shows them.") : !save.disabled ? "not saved yet" : stored ? `saved by ${stored.by}, ${when(stored)}` : "");
  }
  function send(over) {                            // `over`: the other reader's note that this one has seen
    save.disabled = true; choices.hidden = true;
    model.send({ kind: "note", id: state.chosen, text: noteBox.value, seen: (over || notes[state.chosen])?.at || "" });
  }
  heard.note = (m) => {
    if (m.entry) { notes[m.id] = m.entry; delete drafts[m.id]; byId[m.id].note = m.entry.text ? 1 : null; list(); }
    if (m.id !== state.chosen) return;
    if (!m.theirs) return saying(m.fault);
    saying(`Meanwhile ${m.theirs.by} wrote: “${m.theirs.text}”`);
    const pick = (text, f) => h("button", { type: "button", onclick: () => { choices.hidden = true; f(); } }, text);
    choices.replaceChildren(pick("Keep theirs", () => { notes[m.id] = m.theirs; delete drafts[m.id]; noteBox.value = m.theirs.text; saying(); }), pick("Keep both", () => { noteBox.value = `${m.theirs.text}\n${noteBox.value}`; send(m.theirs); }), pick("Replace theirs", () => send(m.theirs)));
    choices.hidden = false;
  };
  function open(id) {
    const c = byId[id], why = c?.flags.filter((f) => f !== "wrong" && f in meta.filters && f !== meta.here) || [];
    if (!c) return;
    state.chosen = id;
    if (shown[c.place] === c) {                    // bring its row into sight
      while (made <= c.place) grow();
      const tr = body.children[c.place], head = table.tHead.offsetHeight;
      scroller.scrollTop = Math.min(tr.offsetTop - head - 4, Math.max(scroller.scrollTop, tr.offsetTop + tr.offsetHeight - scroller.clientHeight + 4));
    }
    if (model.get("chosen") !== id) { model.set("chosen", id); model.save_changes(); }
    body.querySelectorAll("tr").forEach((tr) => { tr.setAttribute("aria-selected", String(tr.dataset.id === id)); tr.tabIndex = tr.dataset.id === id ? 0 : -1; });
    panel.hidden = false;
    title.textContent = id;
    title.title = `patient ${c.patient}`;
    facts.textContent = `${c.label}, called ${c.predicted}${why.length ? `: ${why.join(", ")}` : ""}`;
    facts.className = c.right ? "ccr-right" : "ccr-wrong";
    probs.replaceChildren(...classes.flatMap((k, i) => { const bar = h("i"); bar.style.setProperty("--p", `${100 * c.prob[i]}%`); return [h("span", {}, k), bar, h("b", {}, c.prob[i].toFixed(3))]; }));
    noteBox.value = drafts[id] ?? notes[id]?.text ?? "";
    choices.hidden = true;
    saying(); stepButtons();
    work.replaceChildren(h("div", { className: "ccr-say", role: "status" }, "Loading the scan …"));
    root.dataset.open = "";
    model.send({ kind: "want case", id });
  }
  heard.case = async (m, buffers) => {
    if (m.id !== state.chosen) return;             // another one was chosen meanwhile
    end?.(); end = null;
    const place = h("div"), c = byId[m.id];
    work.replaceChildren(place);
    if (m.state) { m.state.meta.height = 460; end = await standalone(place, { state: m.state, header: m.header, buffers }); }
    const big = thumbOf(c, 4);
    big.className += " ccr-big";
    if (!m.state) place.append(h("div", { className: "ccr-say", role: "status" }, ...(sheets && c.thumb !== null ? [big] : []), m.fault));
    else if (m.fault) place.append(h("p", {}, m.fault));
    root.dataset.open = m.id;
  };
  heard.thumbs = (m, buffers) => {
    sheets = m.sheets.map((s, i) => ({ ...s, url: URL.createObjectURL(new Blob([asBytes(buffers[i])], { type: "image/webp" })) }));
    list();
    root.dataset.thumbs = rows.filter((c) => c.thumb !== null).length;
  };
  const onChosen = () => { if (model.get("chosen") !== state.chosen) open(model.get("chosen")); }, onShow = () => { if (model.get("show") !== state.show) { state.show = model.get("show"); list(); } };
  model.on("change:chosen", onChosen); model.on("change:show", onShow);
  state.show = model.get("show");                  // it may have changed while the rows were on their way
  list();
  model.send({ kind: "want thumbs" });
  if (model.get("chosen")) open(model.get("chosen"));
  root.dataset.ready = "1";
  return () => {
    end?.(); unwatch();
    model.off("msg:custom", listen); model.off("change:chosen", onChosen); model.off("change:show", onShow);
    (sheets || []).forEach((s) => URL.revokeObjectURL(s.url));
  };
}

// ------------------------------------------------------------------ a page of its own: everything lies in it, only saving needs a kernel
async function readingAlone(el, data) {
  const subs = {}, fire = (e, ...a) => [...(subs[e] || [])].forEach((f) => f(...a)), held = { meta: data.meta, chosen: Object.keys(data.volumes)[0] || "", show: "all" };
  const bytes = (b) => Uint8Array.from(atob(b), (c) => c.charCodeAt(0)), none = "This page carries no volume of this case: open it from the notebook.";
  const answers = {
    "want cases": () => [{ kind: "cases", ...data.cases }],
    "want thumbs": () => [{ kind: "thumbs", sheets: data.sheets.map(({ picture, ...s }) => s) }, data.sheets.map((s) => bytes(s.picture))],
    "want case": ({ id }) => { const { buffers = [], ...c } = data.volumes[id] || { fault: none }; return [{ kind: "case", id, ...structuredClone(c) }, buffers]; },
  };
  await reading({ el, model: { get: (k) => held[k], set: (k, v) => { held[k] = v; }, save_changes() {}, on: (e, f) => { (subs[e] ||= []).push(f); }, off() {},
    send: (m) => setTimeout(() => { if (answers[m.kind]) fire("msg:custom", ...answers[m.kind](m)); }) } });
  try {                                            // in a frame of ours: be as tall as the room, and take the still's place
    const frame = window.frameElement;
    if (!frame?.dataset.room) return;
    const fit = () => { frame.style.height = `${Math.ceil(el.getBoundingClientRect().height) + 2}px`; };
    frame.style.position = "static"; frame.style.display = "block";
    for (const i of frame.parentElement.querySelectorAll("[data-fallback]")) i.hidden = true, i.style.display = "none";
    new ResizeObserver(fit).observe(el);
    fit();
  } catch { /* another origin holds the frame: its height stays as it was */ }
}

export default { render: reading, alone: readingAlone, compareCases, sideOf };
