// Three linked planes of a CT volume. The same file runs in two places:
//   * as an anywidget front end, with a kernel behind `model`, and
//   * in a page of its own, where `standalone` gives it a stand-in for the model.
// The voxels come in one message and stay here; a plane is a pure function of them and of the state.
// Axes are (z, y, x): z grows to the head, y to the back, x to the patient's left.

const NAMES = ["axial", "coronal", "sagittal"];   // plane k is cut across axis k
const DOWN = [1, 0, 0], ACROSS = [2, 2, 1];       // the axes that run down and across it
const DASHES = [[], [7, 3], [2.5, 2], [7, 2, 2.5, 2]];   // as in the still figures: colour is never the only difference
const GAP = 2, ROW = 900, FOCUS = 560, NAME = 22;
const LINES = [["#e69f00", ""], ["#56b4e9", "6 3"], ["#f0e442", "2 2"], ["#cc79a7", "7 2 2 2"]];   // profiles of maps (Okabe and Ito 2008), told apart by dash too

// ------------------------------------------------------------------ bytes
function asBytes(v) {
  if (v instanceof Uint8Array) return v;
  return v.buffer ? new Uint8Array(v.buffer, v.byteOffset, v.byteLength) : new Uint8Array(v);
}

async function gunzip(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// One picture that holds the axial slices as tiles, `cols` to a row.
async function untile(bytes, { codec, cols, shape: [nz, ny, nx] }, out) {
  const picture = await createImageBitmap(new Blob([bytes], { type: `image/${codec}` }), { colorSpaceConversion: "none" });
  const canvas = Object.assign(document.createElement("canvas"), { width: picture.width, height: ny });
  const ctx = canvas.getContext("2d", { willReadFrequently: true });
  for (let row = 0; row * cols < nz; row++) {
    ctx.drawImage(picture, 0, -row * ny);
    const px = ctx.getImageData(0, 0, canvas.width, ny).data, n = Math.min(cols, nz - row * cols);
    for (let c = 0; c < n; c++) {
      for (let y = 0, j = (row * cols + c) * ny * nx; y < ny; y++) {
        for (let x = 0, i = 4 * (y * canvas.width + c * nx); x < nx; x++, i += 4) out[j++] = px[i];
      }
    }
  }
  picture.close();
}

// Every part says what it is (volume, masks or map), how it is packed, and its shape.
async function unpack(header, buffers) {
  const data = { masks: [], maps: [] }, size = ([a, b, c]) => a * b * c;
  const slabs = header.parts.filter((p) => p.role === "volume");
  data.volume = new Uint8Array(slabs.reduce((n, p) => n + size(p.shape), 0));
  let at = 0;
  for (const [i, part] of header.parts.entries()) {
    const bytes = asBytes(buffers[i]);
    const plain = part.codec === "raw" ? bytes : part.codec === "gzip" ? await gunzip(bytes) : null;
    if (plain && plain.length !== size(part.shape)) throw new Error(`the ${part.role} came incomplete`);
    if (part.role === "masks") data.masks.push(plain);
    else if (part.role === "map") data.maps.push({ values: plain, shape: part.shape });
    else {
      const slab = data.volume.subarray(at, at += size(part.shape));
      if (plain) slab.set(plain); else await untile(bytes, part, slab);
    }
  }
  return data;
}

// ------------------------------------------------------------------ pictures, without any page
function cut(v, [nz, ny, nx], k, i) {             // slice `i` of plane `k`, head up
  if (k === 0) return v.subarray(i * ny * nx, (i + 1) * ny * nx);
  const w = k === 1 ? nx : ny, out = new Uint8Array(nz * w);
  for (let r = 0; r < nz; r++) {
    const z = nz - 1 - r;
    if (k === 1) out.set(v.subarray((z * ny + i) * nx, (z * ny + i + 1) * nx), r * nx);
    else for (let q = 0, j = z * ny * nx + i; q < ny; q++, j += nx) out[r * ny + q] = v[j];
  }
  return out;
}

function cutBetween(map, k, t) {                  // the same at a fraction of the axis, 0 … 1
  const n = map.shape[k], pos = Math.max(0, Math.min(n - 1, t * n - 0.5)), i = Math.floor(pos), f = pos - i;
  const a = cut(map.values, map.shape, k, i);
  if (!f) return a;
  const b = cut(map.values, map.shape, k, Math.min(n - 1, i + 1));
  return a.map((v, j) => Math.round(v + f * (b[j] - v)));
}

function profile({ values, shape }, k) {          // mean of a map over each slice of plane `k`, 0 … 1
  const n = shape[k], inner = shape.slice(k + 1).reduce((a, b) => a * b, 1), sum = new Float64Array(n);
  for (let i = 0; i < values.length; i++) sum[Math.floor(i / inner) % n] += values[i];
  return sum.map((s) => s * n / values.length / 255);
}

function greys(level, width, [lo, step]) {        // 256 stored values -> RGBA
  const lut = new Uint32Array(256);
  for (let v = 0; v < 256; v++) {
    const g = Math.max(0, Math.min(255, Math.floor(255 * (lo + step * v - level + width / 2) / width + 0.5)));
    lut[v] = (0xff000000 | g << 16 | g << 8 | g) >>> 0;
  }
  return lut;
}

function ramp(hex) {                              // 256 colours as rrggbbaa -> RGBA
  return Uint32Array.from({ length: 256 }, (_, v) => {
    const [r, g, b, a] = [0, 2, 4, 6].map((i) => parseInt(hex.slice(8 * v + i, 8 * v + i + 2), 16));
    return (a << 24 | b << 16 | g << 8 | r) >>> 0;
  });
}

// Outlines of one bit of a slice: closed loops of half-way points between voxel centres, inside always on the same hand.
const CASES = [[], [2, 3], [1, 2], [1, 3], [0, 1], [0, 1, 2, 3], [0, 2], [0, 3], [3, 0], [2, 0], [3, 0, 1, 2], [1, 0], [3, 1], [2, 1], [3, 2], []];
function outline(s, w, h, bit) {
  const W = w + 2, on = new Uint8Array(W * (h + 2)), next = new Int32Array(2 * on.length), ends = [0, 3, 2 * W, 1], starts = [];   // top, right, bottom, left
  for (let y = 0; y < h; y++) for (let x = 0, i = (y + 1) * W + 1, j = y * w; x < w; x++) on[i++] = s[j++] & bit ? 1 : 0;
  for (let i = 0; i < on.length - W; i++) {         // each cell has voxels at its corners: i, i + 1, and those below
    const code = on[i] << 3 | on[i + 1] << 2 | on[i + W + 1] << 1 | on[i + W];
    if (!code || code === 15) continue;
    for (let e = 0, to = CASES[code]; e < to.length; e += 2) {
      starts.push(2 * i + ends[to[e]]);
      next[2 * i + ends[to[e]]] = 2 * i + ends[to[e + 1]];
    }
  }
  const loops = [];
  for (const first of starts) {
    if (!next[first]) continue;
    const loop = [];
    let n = 0;
    for (let p = first, q; (q = next[p]); p = q) {
      const cell = p >> 1, cx = cell % W - 1, cy = (cell - cx - 1) / W - 1, x = p & 1 ? cx + 0.5 : cx + 1, y = p & 1 ? cy + 1 : cy + 0.5;
      if (n > 2 && (x - loop[n - 2]) * (loop[n - 1] - loop[n - 3]) === (y - loop[n - 1]) * (loop[n - 2] - loop[n - 4])) n -= 2;   // straight on: move the last point
      loop[n++] = x; loop[n++] = y;
      next[p] = 0;
    }
    loop.length = n;
    loops.push(loop);
  }
  return loops;
}

// A loop as a path in device pixels, its dashes cut here: the browser's own cost several times the line.
function trace(path, loop, sx, sy, tx, ty, dash) {
  let on = true, d = 0, left = dash[0] || Infinity, x = loop[0] * sx + tx, y = loop[1] * sy + ty;
  path.moveTo(x, y);
  for (let j = 2; j <= loop.length; j += 2) {
    const X = loop[j % loop.length] * sx + tx, Y = loop[j % loop.length + 1] * sy + ty, dx = X - x, dy = Y - y, length = Math.hypot(dx, dy);
    let done = 0;
    for (; length - done > left; left = dash[d = (d + 1) % dash.length]) {
      done += left;
      if (on) path.lineTo(x + dx * done / length, y + dy * done / length); else path.moveTo(x + dx * done / length, y + dy * done / length);
      on = !on;
    }
    left -= length - done;
    if (on) path.lineTo(X, Y);
    x = X; y = Y;
  }
  if (!dash.length) path.closePath();
}

function place(meta, i) {                         // millimetres of a voxel, (z, y, x)
  return meta.origin.map((o, r) => o + meta.direction[r].reduce((sum, d, c) => sum + d * meta.spacing[c] * i[c], 0));
}

// ------------------------------------------------------------------ the page around them
const STYLE = `
.cct{--bg:#f7f8fa;--fg:#1b2026;--dim:#5c6570;--line:#d8dce2;--press:#e3e8ee;--accent:#0a63c2;
 box-sizing:border-box;container-type:inline-size;background:var(--bg);color:var(--fg);border:1px solid var(--line);border-radius:8px;overflow:hidden;
 font:12.5px/1.35 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums;text-align:left;position:relative}
.cct[data-theme=dark]{--bg:#14171b;--fg:#dde1e6;--dim:#929ba6;--line:#2a2f36;--press:#2b323b;--accent:#78b7ff}
.cct *{box-sizing:border-box}
.cct-bar{display:flex;flex-wrap:wrap;align-items:center;gap:6px 12px;padding:7px 10px;min-height:40px}
.cct-bar+.cct-bar,.cct-foot{border-top:1px solid var(--line)}
.cct-title{font-weight:600;flex:1 1 120px;overflow-wrap:anywhere;min-width:0}
.cct-group{display:flex;flex-wrap:wrap;align-items:center;gap:4px 6px}
.cct button,.cct select,.cct input[type=number]{font:inherit;color:inherit;background:transparent;border:1px solid transparent;border-radius:5px;margin:0;height:26px;padding:0 8px;min-width:0}
.cct button{cursor:pointer;display:inline-flex;align-items:center;justify-content:center;gap:6px;white-space:nowrap;box-shadow:none}
.cct button:hover{background:var(--press)}
.cct button[aria-pressed=true]{background:var(--press)}
.cct-seg{display:flex;border:1px solid var(--line);border-radius:6px;padding:1px}
.cct-seg button{height:24px;border-radius:4px;color:var(--dim)}
.cct-seg button[aria-pressed=true]{color:var(--fg);font-weight:600}
.cct-icon{width:28px;padding:0!important;color:var(--dim)!important}
.cct-icon[aria-pressed=true]{color:var(--accent)!important}
.cct-icon svg{width:16px;height:16px;fill:none;stroke:currentColor;stroke-width:1.5;stroke-linecap:round;stroke-linejoin:round;display:block}
.cct label{display:inline-flex;align-items:center;gap:5px;color:var(--dim);margin:0}
.cct input[type=number]::-webkit-inner-spin-button{display:none}
.cct input[type=number]{width:58px;border-color:var(--line);color:var(--fg);padding:0 0 0 7px;-moz-appearance:textfield;appearance:textfield}
.cct select{border-color:var(--line);color:var(--fg);background:var(--bg);max-width:220px;padding:0 4px}
.cct input[type=range]{-webkit-appearance:none;appearance:none;background:transparent;margin:0;padding:0;height:var(--strip);cursor:pointer;min-width:0;border:0;box-shadow:none}
.cct input[type=range]::-webkit-slider-runnable-track{height:2px;border-radius:1px;background:var(--track,var(--line))}
.cct input[type=range]::-moz-range-track{height:2px;border-radius:1px;background:var(--track,var(--line))}
.cct input[type=range]::-webkit-slider-thumb{-webkit-appearance:none;width:12px;height:12px;border-radius:50%;border:0;margin-top:-5px;background:var(--knob,var(--fg))}
.cct input[type=range]::-moz-range-thumb{width:12px;height:12px;border-radius:50%;border:0;background:var(--knob,var(--fg))}
.cct :is(button,select,input):focus-visible{outline:2px solid var(--accent);outline-offset:1px}
.cct-stage{display:grid;gap:${GAP}px;background:#22262b;position:relative;min-height:120px}
.cct-cell{position:relative;background:#000;display:flex;flex-direction:column;overflow:hidden;--track:#30353b;--knob:#9aa3ad}
.cct-cell canvas{display:block;cursor:crosshair;outline:0;touch-action:pan-y;user-select:none;-webkit-user-select:none;-webkit-touch-callout:none}
.cct-cell:has(canvas:focus-visible)::after{content:"";position:absolute;inset:0;border:2px solid #78b7ff;pointer-events:none}
.cct-cell:focus-within{--knob:#dde1e6}
.cct-line{position:absolute;left:0;top:0;pointer-events:none;--c:rgba(160,205,255,.6)}
.cct-line-x{width:1px;bottom:0;background:linear-gradient(transparent 24px,var(--c) 0 calc(var(--gap) - 9px),transparent 0 calc(var(--gap) + 9px),var(--c) 0 calc(100% - 24px),transparent 0)}
.cct-line-y{height:1px;right:0;background:linear-gradient(90deg,transparent 24px,var(--c) 0 calc(var(--gap) - 9px),transparent 0 calc(var(--gap) + 9px),var(--c) 0 calc(100% - 24px),transparent 0)}
.cct-pic{position:relative;overflow:hidden}
.cct-name{height:${NAME}px;line-height:${NAME}px;padding:0 30px 0 9px;color:#dde1e6;background:#000;font-weight:600;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.cct-slide{position:relative;height:var(--strip);background:#000;--track:#30353b;--knob:#9aa3ad}
.cct-slide:focus-within{--knob:#dde1e6}
.cct-slide input{position:relative;display:block;width:calc(100% - 20px);margin:0 10px!important}
.cct-slide svg{position:absolute;left:16px;top:3px;width:calc(100% - 32px);height:calc(100% - 6px);overflow:visible}
.cct-slide path{fill:none;stroke-width:1.6;vector-effect:non-scaling-stroke}
.cct-slide .cct-area{fill:#e69f0066;stroke:#e69f00;stroke-width:1}
.cct-rail{grid-column:1/-1;background:#000;--strip:52px}
.cct-key{display:flex;flex-wrap:wrap;gap:2px 14px;padding:5px 12px 0;color:#aeb6bf;min-height:23px}
.cct-key svg{width:24px;height:6px;margin-right:5px;vertical-align:middle;fill:none;stroke-width:2}
.cct-cell button{position:absolute;top:5px;right:5px;color:#aeb6bf!important;opacity:0;background:#0009}
.cct-cell:hover button,.cct-cell button:focus-visible{opacity:1}
.cct-cell button:hover{background:#333c}
@media (hover:none){.cct-cell button{opacity:.75}}
.cct-chip i{width:20px;height:10px;border-radius:2px;flex:none;background:#000;position:relative;overflow:hidden}
.cct-chip i::after{content:"";position:absolute;inset:4px 0 auto;height:2px;background:var(--dash,var(--c))}
.cct-chip .cct-line1{--dash:repeating-linear-gradient(90deg,var(--c) 0 6px,transparent 6px 8px)}
.cct-chip .cct-line2{--dash:repeating-linear-gradient(90deg,var(--c) 0 2px,transparent 2px 4px)}
.cct-chip .cct-line3{--dash:repeating-linear-gradient(90deg,var(--c) 0 6px,transparent 6px 8px,var(--c) 8px 10px,transparent 10px 12px)}
.cct-chip[aria-pressed=false]{color:var(--dim);text-decoration:line-through}
.cct-chip[aria-pressed=false] i{opacity:.35}
.cct button.cct-chip{max-width:240px;padding:0 7px}
.cct-chip span{overflow:hidden;text-overflow:ellipsis}
.cct-scale{display:inline-flex;align-items:center;gap:5px;color:var(--dim)}
.cct-scale canvas{width:84px;height:9px;border-radius:2px;background:#000}
.cct-foot{display:flex;flex-wrap:wrap;justify-content:space-between;gap:2px 18px;padding:6px 10px;color:var(--dim);min-height:31px}
.cct-read{display:flex;flex-wrap:wrap;gap:2px 14px;min-width:0}
.cct-read b{font-weight:600;color:var(--fg);min-width:7.2em}
.cct-read span{overflow-wrap:anywhere}
.cct-say{position:absolute;inset:0;display:grid;place-items:center;color:#aeb6bf;background:#000;padding:12px;text-align:center}
.cct-help{position:absolute;z-index:2;right:8px;top:44px;width:min(340px,calc(100% - 16px));background:var(--bg);border:1px solid var(--line);border-radius:8px;padding:10px 14px;box-shadow:0 8px 30px #0006}
.cct-help dl{display:grid;grid-template-columns:auto 1fr;gap:4px 12px;margin:0}
.cct-help dt{font-weight:600;margin:0}.cct-help dd{margin:0;color:var(--dim)}
.cct [hidden]{display:none!important}
.cct:fullscreen{border:0;border-radius:0;display:flex;flex-direction:column}
.cct:fullscreen .cct-stage{margin:auto 0}
@container (max-width:559px){.cct-bar{padding:7px 8px}.cct-title{flex-basis:100%}.cct button,.cct select,.cct input[type=number]{height:32px}.cct-seg{flex:1 0 100%}.cct-seg button{height:30px;flex:1;padding:0 5px}.cct-icon{width:32px}.cct-tools{gap:2px}.cct-read b{min-width:0}}
`;

const ICONS = {
  cross: "M8 1v5M8 10v5M1 8h5M10 8h5", minus: "M3 8h10", plus: "M3 8h10M8 3v10",
  full: "M2 6V2h4M10 2h4v4M14 10v4h-4M6 14H2v-4", help: "M6 6a2 2 0 1 1 2.7 1.9c-.5.2-.7.6-.7 1.1v.5M8 12v.2",
};

function h(tag, props = {}, ...kids) {            // text only ever becomes a text node
  const el = document.createElement(tag);
  for (const [k, v] of Object.entries(props)) {
    if (k === "data") Object.assign(el.dataset, v);
    else if (k.startsWith("on")) el.addEventListener(k.slice(2), v);
    else if (k in el && !k.startsWith("aria")) el[k] = v;
    else el.setAttribute(k, v);
  }
  el.append(...kids);
  return el;
}

function iconButton(icon, label, onclick, more = {}) {
  const b = h("button", { type: "button", className: "cct-icon", title: label, "aria-label": label, onclick, ...more });
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), path = document.createElementNS(svg.namespaceURI, "path");
  svg.setAttribute("viewBox", "0 0 16 16"); svg.setAttribute("aria-hidden", "true"); path.setAttribute("d", ICONS[icon]);
  svg.append(path); b.append(svg);
  return b;
}

const number = (v, digits = 0) => v.toFixed(digits).replace("-", "\u2212");

function themeOf(doc) {                           // what the page around us says, else the system
  let host = doc;
  try { host = doc.defaultView.frameElement?.ownerDocument || doc; } catch { /* another origin holds the frame */ }
  for (const el of [host.body, host.documentElement]) {
    if (el.dataset.jpThemeLight) return el.dataset.jpThemeLight === "true" ? "light" : "dark";
    if (el.dataset.theme === "light" || el.dataset.theme === "dark") return el.dataset.theme;
  }
  return doc.defaultView.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

function watchTheme(doc, set) {
  let host = doc;
  try { host = doc.defaultView.frameElement?.ownerDocument || doc; } catch { /* as above */ }
  const update = () => set(themeOf(doc)), seen = new MutationObserver(update), media = doc.defaultView.matchMedia("(prefers-color-scheme: dark)");
  for (const el of [host.body, host.documentElement]) seen.observe(el, { attributes: true, attributeFilter: ["data-theme", "data-jp-theme-light"] });
  media.addEventListener("change", update);
  update();
  return () => { seen.disconnect(); media.removeEventListener("change", update); };
}

// The voxels come in one message, on request: they are never part of the saved widget state.
function ask(model) {
  return new Promise((resolve) => {
    const got = (header, buffers) => {
      if (header.kind !== "voxels") return;
      model.off("msg:custom", got);
      resolve({ header, buffers });
    };
    model.on("msg:custom", got);
    model.send({ kind: "want voxels" });
  });
}

async function render({ model, el }) {
  const meta = model.get("meta"), { shape, spacing, masks, maps, presets, letters, range } = meta;
  const mm = NAMES.map((_, k) => [shape[ACROSS[k]] * spacing[ACROSS[k]], shape[DOWN[k]] * spacing[DOWN[k]]]);
  el.classList.add("covid-ct-viewer");
  const root = h("div", { className: "cct", role: "group", "aria-label": meta.title ? `CT viewer: ${meta.title}` : "CT viewer" });
  const stage = h("div", { className: "cct-stage" }), say = h("div", { className: "cct-say", role: "status" }, "Unpacking the voxels …");
  root.append(h("style", {}, STYLE), stage);
  stage.append(say);
  el.append(root);
  const unwatch = watchTheme(el.ownerDocument, (t) => { root.dataset.theme = t; });
  let data, header;
  try {
    const got = await ask(model);
    header = got.header;
    data = await unpack(header, got.buffers);
  } catch (e) {
    say.setAttribute("role", "alert");
    say.textContent = `The volume could not be shown: ${e.message}. A current browser is needed (WebP, gzip streams).`;
    return unwatch;
  }
  say.remove();

  // -------------------------------------------------------------- state
  const state = {}, KEYS = ["index", "level", "window", "preset", "alpha", "crosshair", "layers", "map", "side"];
  KEYS.forEach((k) => { state[k] = model.get(k); });
  state.side ||= "";
  const look = { zoom: 1, solo: -1, hover: null, pan: mm.map(([w, v]) => [w / 2, v / 2]), other: maps[1] || "", flip: false, timer: 0 };   // of this view only
  const strip = maps.length ? 34 : 22;             // the slider's height: the profile of the map lies behind it
  root.style.setProperty("--strip", `${strip}px`);
  const colours = ramp(meta.ramp);
  let lut, lutKey = "", unsaved = false, queued = false;

  function change(part) {
    Object.assign(state, part);
    for (const [k, v] of Object.entries(part)) model.set(k, Array.isArray(v) ? [...v] : v);
    unsaved = true;
    redraw();
  }
  function go(k, i) {
    const index = [...state.index];
    index[k] = Math.max(0, Math.min(shape[k] - 1, Math.round(i)));
    if (index[k] !== state.index[k]) change({ index });
  }
  const shown = () => (look.flip ? look.other : state.map);
  function showMap(map) {                          // the map before it stays at hand: B and the button blink between the two
    blink(false);
    if (map !== state.map) { look.other = state.map; change({ map }); } else redraw();
  }
  function blink(on) {
    clearInterval(look.timer);
    if (look.other === state.map) look.other = maps.find((m) => m !== state.map) || "";
    look.timer = on ? setInterval(() => { look.flip = !look.flip; redraw(); }, 700) : 0;
    look.flip = on;
  }
  const still = () => el.ownerDocument.defaultView.matchMedia("(prefers-reduced-motion: reduce)").matches;
  const swap = () => { blink(false); showMap(look.other); };
  function setSide(side) { change({ side }); look.solo = -1; build(); layout(); }
  function setWindow(level, width) {
    level = Math.round(level / range[1]) * range[1]; width = Math.max(range[1], Math.round(width / range[1]) * range[1]);
    const preset = Object.keys(presets).find((p) => presets[p][0] === level && presets[p][1] === width) || "custom";
    change({ level, window: width, preset });
  }

  // -------------------------------------------------------------- controls
  const bar = h("div", { className: "cct-bar" }), tools = h("div", { className: "cct-group cct-tools" });
  if (meta.title) bar.append(h("div", { className: "cct-title" }, meta.title));
  const seg = h("div", { className: "cct-seg", role: "group", "aria-label": "Window" });
  const presetButtons = Object.entries(presets).map(([name, [level, width]]) => h("button", {
    type: "button", title: `level ${number(level)}, width ${number(width)}`, data: { preset: name },
    onclick: () => change({ level, window: width, preset: name }) }, name[0].toUpperCase() + name.slice(1)));
  seg.append(...presetButtons);
  const typed = (key, label) => h("input", { type: "number", step: range[1] < 1 ? "any" : 10, data: { control: key }, "aria-label": `Window ${label}`,
    onchange: (e) => { const v = Number(e.target.value); if (e.target.value !== "" && isFinite(v) && (key === "level" || v > 0)) setWindowTyped(key, v); else redraw(); } });
  const setWindowTyped = (key, v) => (key === "level" ? setWindow(v, state.window) : setWindow(state.level, v));
  const levelInput = typed("level", "level"), widthInput = typed("window", "width");
  bar.append(seg, h("div", { className: "cct-group" }, h("label", {}, "L", levelInput), h("label", {}, "W", widthInput)));
  const crossButton = iconButton("cross", "Crosshair (C)", () => change({ crosshair: !state.crosshair }), { data: { control: "crosshair" } });
  const helpPanel = h("div", { className: "cct-help", hidden: true, role: "note" }, h("dl", {}, ...[
    ["Wheel, ↑ ↓", "next slice of the plane under the pointer or in focus"], ["PgUp, PgDn", "a tenth of the scan"], ["Home, End", "first, last slice"],
    ["Drag, tap", "move the crosshair; the other planes follow"], ["Right or ⇧ drag", "window: up–down level, left–right width"],
    ["Ctrl wheel, pinch", "zoom"], ["Alt or middle drag", "move the zoomed picture"], ["Double click", "one plane large, and back"],
    [`1 – ${Object.keys(presets).length}`, Object.keys(presets).join(", ")], ["C · + − 0", "crosshair · zoom"],
    ...(maps.length ? [["B", "the other map, and back"], ["S", "maps side by side"]] : []),
  ].flatMap(([a, b]) => [h("dt", {}, a), h("dd", {}, b)])));
  const helpButton = iconButton("help", "Help", () => { helpPanel.hidden = !helpPanel.hidden; helpButton.setAttribute("aria-expanded", String(!helpPanel.hidden)); }, { "aria-expanded": "false" });
  tools.append(crossButton, iconButton("minus", "Zoom out (−)", () => zoomBy(1 / 1.5)), iconButton("plus", "Zoom in (+)", () => zoomBy(1.5)));
  if (root.requestFullscreen && el.ownerDocument.fullscreenEnabled) {
    tools.append(iconButton("full", "Full screen", () => (el.ownerDocument.fullscreenElement ? el.ownerDocument.exitFullscreen() : root.requestFullscreen())));
  }
  tools.append(helpButton);
  tools.style.marginLeft = "auto";
  bar.append(tools);

  const legend = h("div", { className: "cct-bar", "aria-label": "Layers", role: "group" }), chips = h("div", { className: "cct-group" });
  const chipOf = masks.map(({ name, colour, style }) => {
    const chip = h("button", { type: "button", className: "cct-chip", title: `outline of ${name}`, data: { mask: name },
      onclick: () => change({ layers: masks.map((m) => m.name).filter((n) => (n === name) !== state.layers.includes(n)) }) }, h("i", { className: `cct-line${style}` }), h("span", {}, name));
    chip.style.setProperty("--c", colour);
    return chip;
  });
  chips.append(...chipOf);
  if (masks.length) legend.append(chips);
  let mapSelect, alphaInput, alphaOut, scale, blinkButton, sideSelect;
  if (maps.length) {
    mapSelect = h("select", { data: { control: "map" }, "aria-label": "Map", onchange: () => showMap(mapSelect.value) },
      ...maps.map((m) => h("option", { value: m }, m)), h("option", { value: "" }, "no map"));
    const bar01 = h("canvas", { width: 256, height: 1, "aria-hidden": "true" }), sctx = bar01.getContext("2d"), px = sctx.createImageData(256, 1);
    new Uint32Array(px.data.buffer).set(colours); sctx.putImageData(px, 0, 0);
    scale = h("span", { className: "cct-scale", role: "img", "aria-label": `Colour scale from 0 to 1${meta.unit ? `, ${meta.unit}` : ""}; the same for all maps` }, "0", bar01, "1", h("span", {}, meta.unit || ""));
    alphaInput = h("input", { type: "range", min: 0, max: 1, step: 0.05, data: { control: "alpha" }, "aria-label": "Opacity of the map", oninput: () => change({ alpha: Number(alphaInput.value) }) });
    alphaInput.style.width = "84px";
    alphaOut = h("output", {});
    blinkButton = h("button", { type: "button", title: "Blink between this map and the one before (B for a single change)", data: { control: "blink" }, "aria-pressed": "false",
      onclick: () => { if (still()) swap(); else { blink(!look.timer); redraw(); } } }, "Blink");
    blinkButton.style.border = "1px solid var(--line)";
    sideSelect = h("select", { data: { control: "side" }, "aria-label": "Layout", onchange: () => setSide(sideSelect.value) },
      h("option", { value: "" }, "three planes"), ...NAMES.map((n) => h("option", { value: n }, `maps side by side, ${n}`)));
    legend.append(h("div", { className: "cct-group" }, mapSelect, blinkButton, scale), h("label", {}, "Opacity", alphaInput, alphaOut), sideSelect);
  }
  root.insertBefore(bar, stage);
  if (legend.childElementCount) root.insertBefore(legend, stage);
  root.append(helpPanel);
  const value = h("b"), where = h("span"), inside = h("span"), note = h("span", { className: "cct-note" }, header.note || "");
  const foot = h("div", { className: "cct-foot" }, h("div", { className: "cct-read" }, value, where, inside), note);
  root.append(foot);

  // -------------------------------------------------------------- planes
  const panels = [{ title: "scan", map: -1, bare: true }, ...(masks.length ? [{ title: masks.map((m) => m.name).join(", "), map: -1 }] : []), ...maps.map((title, map) => ({ title, map }))];
  let panes = [], rails = [];
  function build() {                               // three planes of one map, or one plane of every map
    const k = NAMES.indexOf(state.side);
    rails = [];
    panes = k < 0 ? NAMES.map((_, i) => makePane(i, i)) : panels.map((panel, i) => makePane(k, i, panel));
    stage.replaceChildren(...panes.map((p) => p.cell));
    if (k >= 0) stage.append(h("div", { className: "cct-rail" }, makeSlide(k), ...(maps.length ? [keyOf(k)] : [])));
  }
  function makeSlide(k) {                          // a slider with the profile of what is shown behind it
    const name = NAMES[k], curve = svg("svg", { viewBox: `0 0 ${Math.max(1, shape[k] - 1)} 1`, preserveAspectRatio: "none", role: "img" });
    const slider = h("input", { type: "range", min: 0, max: shape[k] - 1, step: 1, tabIndex: state.side ? 0 : -1, data: { control: name }, "aria-label": `${name} slice`, oninput: () => go(k, Number(slider.value)) });
    rails.push({ k, slider, curve, key: null });
    return h("div", { className: "cct-slide" }, curve, slider);
  }
  const profiles = {};
  const profileOf = (m, k) => (profiles[`${m} ${k}`] ||= profile(data.maps[m], k));
  const sharesOf = (m, k) => { const p = profileOf(m, k), all = p.reduce((a, b) => a + b, 0) * shape[k] / p.length || 1; return [...p].map((v) => v / all); };   // of the whole map, per slice
  const topOf = (ms, k) => Math.max(1e-6, ...ms.flatMap((m) => sharesOf(m, k)));
  function svg(tag, more) {
    const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [a, v] of Object.entries(more)) e.setAttribute(a, v);
    return e;
  }
  function keyOf(k) {
    const top = 100 * topOf(maps.map((_, m) => m), k);
    return h("div", { className: "cct-key" }, h("span", {}, `share of a map in each ${NAMES[k]} slice, 0 to ${top.toFixed(1)} %:`), ...maps.map((name, m) => {
      const line = svg("svg", { viewBox: "0 0 24 6", "aria-hidden": "true" });
      line.append(svg("path", { d: "M0 3H24", stroke: LINES[m % 4][0], "stroke-dasharray": LINES[m % 4][1] }));
      return h("span", {}, line, name);
    }));
  }
  function drawRail(rail) {                        // every map in the side-by-side layout, else the one that is shown
    const { k, curve, slider } = rail, i = state.index[k], on = state.side ? maps.map((_, m) => m) : [maps.indexOf(shown())].filter((m) => m >= 0);
    slider.value = i;
    slider.setAttribute("aria-valuetext", `slice ${i + 1} of ${shape[k]}`);
    if (rail.key === on.join() + state.side) return;
    rail.key = on.join() + state.side;
    const top = topOf(on, k), N = shape[k];
    curve.replaceChildren(...on.map((m) => {
      const p = sharesOf(m, k), line = p.map((v, j) => `${((j + 0.5) * N / p.length - 0.5).toFixed(2)} ${(1 - v / top).toFixed(3)}`).join("L");
      return state.side ? svg("path", { d: `M${line}`, stroke: LINES[m % 4][0], "stroke-dasharray": LINES[m % 4][1] }) : svg("path", { d: `M-.5 1L${line}L${N - 0.5} 1Z`, class: "cct-area" });
    }));
    const said = on.map((m) => { const p = profileOf(m, k), best = p.indexOf(Math.max(...p)); return `${maps[m]} is highest, ${p[best].toFixed(2)}, at slice ${Math.floor((best + 0.5) * N / p.length) + 1}`; });
    curve.setAttribute("aria-label", said.length ? `Mean over each ${NAMES[k]} slice: ${said.join("; ")}` : "No map is shown");
    slider.title = said.join("; ");
  }
  function makePane(k, i, panel) {
    const name = NAMES[k], w = shape[ACROSS[k]], v = shape[DOWN[k]];
    const canvas = h("canvas", { tabIndex: 0, role: "slider", "aria-orientation": "vertical", "aria-valuemin": 1, "aria-valuemax": shape[k],
      "aria-label": `${name} plane${panel ? `, ${panel.title}` : ""}`, data: panel ? { plane: name, panel: panel.title } : { plane: name } });
    const grow = iconButton("full", `Enlarge the ${panel ? panel.title : `${name} plane`}`, () => solo(look.solo === i ? -1 : i));
    const lines = [0, 1].map((a) => h("i", { className: `cct-line cct-line-${"xy"[a]}` })), picture = h("div", { className: "cct-pic" }, canvas, ...lines);
    const cell = h("div", { className: "cct-cell" }, ...(panel ? [h("div", { className: "cct-name", title: panel.title }, panel.title)] : []), picture, ...(panel ? [] : [makeSlide(k)]), grow);
    const layer = () => { const c = h("canvas"); return { c, key: "" }; };
    const p = { k, i, panel, w, v, cell, canvas, ctx: canvas.getContext("2d"), grey: layer(), heat: layer(), loops: [], cutAt: -1, lines, key: "", fit: 1 };
    listen(p);
    return p;
  }

  function fill(layer, w, v, bytes, table, key) {  // a slice through a table of 256 colours; kept until its key changes
    if (layer.key === key) return;
    layer.key = key;
    if (layer.c.width !== w || layer.c.height !== v) { layer.c.width = w; layer.c.height = v; layer.img = null; }
    const ctx = layer.c.getContext("2d");
    layer.img ||= ctx.createImageData(w, v);
    const px = new Uint32Array(layer.img.data.buffer), s = bytes();
    for (let i = 0; i < px.length; i++) px[i] = table[s[i]];
    ctx.putImageData(layer.img, 0, 0);
  }

  function view(p) {                               // device pixels per mm, and where the picture begins
    const s = p.fit * look.zoom * p.dpr, [cx, cy] = look.pan[p.k];
    return { s, x: p.canvas.width / 2 - cx * s, y: p.canvas.height / 2 - cy * s };
  }
  const rowOf = (k, i) => (k ? shape[0] - 1 - i : i);   // head up: rows run against z

  function draw(p) {                               // a plane that shows what it showed is left alone: a slice costs one plane, not three
    const { k, ctx, canvas, w, v, dpr } = p, i = state.index[k], t = view(p);
    if (!canvas.width) return;
    const sx = spacing[ACROSS[k]] * t.s, sy = spacing[DOWN[k]] * t.s;
    crosshair(p, t, sx, sy);
    const key = [i, lutKey, state.layers.join("\n"), shown(), state.alpha, t.s, t.x, t.y, canvas.width, canvas.height].join("|");
    if (p.key === key) return;
    p.key = key;
    fill(p.grey, w, v, () => cut(data.volume, shape, k, i), lut, `${i} ${lutKey}`);
    ctx.globalAlpha = 1;
    ctx.fillStyle = "#000";
    ctx.fillRect(0, 0, canvas.width, canvas.height);
    ctx.drawImage(p.grey.c, t.x, t.y, w * sx, v * sy);
    const which = p.panel ? p.panel.map : maps.indexOf(shown());
    if (which >= 0 && state.alpha > 0) {
      const map = data.maps[which];
      fill(p.heat, map.shape[ACROSS[k]], map.shape[DOWN[k]], () => cutBetween(map, k, (i + 0.5) / shape[k]), colours, `${i} ${which}`);
      ctx.globalAlpha = state.alpha;
      ctx.drawImage(p.heat.c, t.x, t.y, w * sx, v * sy);
      ctx.globalAlpha = 1;
    }
    if (!p.panel?.bare) outlines(p, t, sx, sy);
    furniture(p, t);
    const text = `slice ${i + 1} of ${shape[k]}`;
    canvas.setAttribute("aria-valuenow", i + 1);
    canvas.setAttribute("aria-valuetext", text);
  }

  function outlines(p, t, sx, sy) {
    const { k, ctx, w, v, dpr } = p, i = state.index[k];
    if (p.cutAt !== i) { p.cutAt = i; p.loops = []; }
    ctx.lineWidth = 1.6 * dpr;
    ctx.lineJoin = "bevel";
    for (let m = masks.length - 1; m >= 0; m--) {    // the first mask lies on top
      if (!state.layers.includes(masks[m].name)) continue;
      p.loops[m] ||= outline(cut(data.masks[m >> 3], shape, k, i), w, v, 1 << (m & 7));
      const path = new Path2D();
      for (const loop of p.loops[m]) trace(path, loop, sx, sy, t.x, t.y, DASHES[masks[m].style].map((l) => l * dpr));
      ctx.strokeStyle = masks[m].colour;
      ctx.stroke(path);
    }
  }

  function crosshair({ k, dpr, lines }, t, sx, sy) {   // two thin elements over the canvas, with a gap where they meet
    const at = [(t.x + (state.index[ACROSS[k]] + 0.5) * sx) / dpr, (t.y + (rowOf(k, state.index[DOWN[k]]) + 0.5) * sy) / dpr];
    lines.forEach((line, a) => {
      line.hidden = !state.crosshair;
      line.style.transform = `translate${"XY"[a]}(${Math.round(at[a])}px)`;
      line.style.setProperty("--gap", `${Math.round(at[1 - a])}px`);
    });
  }

  function furniture(p, t) {                       // letters, slice number, scale bar: what makes a picture a CT
    const { k, ctx, canvas, dpr } = p, W = canvas.width, H = canvas.height, m = 8 * dpr;
    const put = (text, x, y, align, base, colour = "rgba(232,237,242,.95)") => {
      ctx.textAlign = align; ctx.textBaseline = base;
      ctx.lineWidth = 3 * dpr; ctx.strokeStyle = "rgba(0,0,0,.7)"; ctx.strokeText(text, x, y);
      ctx.fillStyle = colour; ctx.fillText(text, x, y);
    };
    ctx.font = `600 ${12 * dpr}px system-ui, sans-serif`;
    if (meta.known) {
      const [low, high] = letters[ACROSS[k]], [first, last] = k ? [...letters[DOWN[k]]].reverse() : letters[DOWN[k]];
      put(low, m, H / 2, "left", "middle"); put(high, W - m, H / 2, "right", "middle");
      put(first, W / 2, m, "center", "top"); put(last, W / 2, H - m, "center", "bottom");
    }
    ctx.font = `${11 * dpr}px system-ui, sans-serif`;
    const zoom = look.zoom > 1 ? `  ×${look.zoom.toFixed(1)}` : "";
    put(`${NAMES[k]}  ${state.index[k] + 1}/${shape[k]}${zoom}`, m, m, "left", "top", "rgba(205,213,221,.95)");
    if (!meta.known) return;
    const length = [200, 100, 50, 20, 10, 5, 2, 1].find((l) => l * t.s <= W / 4) || 1, x1 = W - m, x0 = x1 - length * t.s, y = H - m - dpr;
    for (const [style, width] of [["rgba(0,0,0,.7)", 4], ["rgba(222,228,235,.92)", 1.5]]) {
      ctx.strokeStyle = style; ctx.lineWidth = width * dpr; ctx.lineJoin = "miter";
      ctx.beginPath(); ctx.moveTo(x0, y - 4 * dpr); ctx.lineTo(x0, y); ctx.lineTo(x1, y); ctx.lineTo(x1, y - 4 * dpr); ctx.stroke();
    }
    put(length >= 10 ? `${length / 10} cm` : `${length} mm`, (x0 + x1) / 2, y - 5 * dpr, "center", "bottom", "rgba(190,198,207,.95)");
  }

  function readout() {
    const i = look.hover || state.index, [z, y, x] = i, j = (z * shape[1] + y) * shape[2] + x, v = data.volume[j];
    const hu = range[0] + range[1] * v, end = v === 0 ? "≤ " : v === 255 ? "≥ " : "";
    const error = end ? "" : ` ±${number(header.error, range[1] < 1 ? 3 : 0)}`;
    value.textContent = meta.units === "HU" ? `${end}${number(hu)}${error} HU` : `grey ${number(hu, range[1] < 1 ? 2 : 0)}${error}`;
    where.textContent = meta.known ? `${place(meta, i).map((c, a) => `${"zyx"[a]} ${number(c, 1)}`).join(" · ")} mm` : `voxel z ${z} · y ${y} · x ${x}, geometry unknown`;
    where.title = `voxel (z, y, x) = (${z}, ${y}, ${x})` + (meta.known ? "; millimetres in LPS: they grow to the patient's left (x), back (y) and head (z)" : "");
    const names = masks.filter((_, m) => data.masks[m >> 3][j] >> (m & 7) & 1).map((m) => m.name), on = state.side ? maps : [shown()].filter(Boolean);
    for (const map of on) {
      const { values, shape: n } = data.maps[maps.indexOf(map)], [a, b, c] = i.map((q, k) => Math.min(n[k] - 1, Math.floor((q + 0.5) / shape[k] * n[k])));
      names.push(`${map} ${(values[(a * n[1] + b) * n[2] + c] / 255).toFixed(2)}`);
    }
    inside.textContent = names.join(" · ");
  }

  function controls() {
    const on = (b, v) => b.setAttribute("aria-pressed", String(v)), digits = range[1] < 1 ? 2 : 0;
    presetButtons.forEach((b) => on(b, b.dataset.preset === state.preset));
    on(crossButton, state.crosshair);
    const focused = el.getRootNode().activeElement;
    if (focused !== levelInput) levelInput.value = state.level.toFixed(digits);
    if (focused !== widthInput) widthInput.value = state.window.toFixed(digits);
    chipOf.forEach((c) => on(c, state.layers.includes(c.dataset.mask)));
    if (!maps.length) return;
    mapSelect.value = shown();
    mapSelect.disabled = blinkButton.disabled = Boolean(state.side);
    sideSelect.value = state.side;
    on(blinkButton, Boolean(look.timer));
    alphaInput.value = state.alpha;
    alphaInput.disabled = !(shown() || state.side || look.timer);
    scale.style.opacity = alphaInput.disabled ? 0.35 : 1;
    alphaOut.textContent = `${Math.round(100 * state.alpha)} %`;
  }

  function redraw() {
    if (queued) return;
    queued = true;
    requestAnimationFrame(() => {
      queued = false;
      const start = performance.now(), key = `${state.level} ${state.window}`;
      if (key !== lutKey) { lut = greys(state.level, state.window, range); lutKey = key; }
      panes.forEach((p) => { follow(p); draw(p); });
      rails.forEach(drawRail);
      readout();
      controls();
      root.dataset.drawMs = (performance.now() - start).toFixed(2);
      root.dataset.frames = Number(root.dataset.frames || 0) + 1;
      root.dataset.ready = "1";
      if (unsaved) { unsaved = false; model.save_changes(); }
    });
  }

  // -------------------------------------------------------------- layout: one scale in mm for all three where they stand in a row
  function room(chrome) {                          // how high the planes may be
    const win = el.ownerDocument.defaultView;
    if (el.ownerDocument.fullscreenElement === root || meta.fill) return Math.max(180, win.innerHeight - chrome);
    return meta.height || Infinity;
  }
  function layout() {
    const W = stage.clientWidth, fill = root.getBoundingClientRect().height - stage.getBoundingClientRect().height + strip + (meta.fill ? 24 : 0), max = room(fill);
    if (!W) return;
    let size;                                      // css pixels of each canvas
    const one = look.solo, wide = mm.map((m) => m[0]), high = mm.map((m) => m[1]);
    panes.forEach((p) => { p.cell.hidden = one >= 0 && p.i !== one; p.cell.style.gridRow = ""; p.canvas.style.touchAction = one >= 0 ? "none" : ""; });
    if (one >= 0) {
      const win = el.ownerDocument.defaultView.innerHeight;
      size = mm.map(([a, b]) => [W, Math.min(Math.max(60, W * b / a), max, Math.max(320, isFinite(max) ? max : 0.8 * Math.max(win, 500)))]);
      stage.style.gridTemplateColumns = "100%";
    } else if (state.side) {
      const n = panes.length, cols = Math.max(1, Math.min(n, Math.floor(W / 190))), rows = Math.ceil(n / cols), w = Math.floor((W - GAP * (cols - 1)) / cols);
      size = mm.map(([a, b]) => [w, Math.max(60, Math.min(w * b / a, (max - 75) / rows - NAME - GAP))]);
      stage.style.gridTemplateColumns = `repeat(${cols},minmax(0,1fr))`;
    } else if (W >= ROW) {
      const sum = wide[0] + wide[1] + wide[2], free = W - 2 * GAP, H = Math.max(60, Math.min(Math.max(...high) * free / sum, max));
      size = wide.map((a) => [Math.floor(free * a / sum), Math.floor(H)]);
      stage.style.gridTemplateColumns = size.map((s) => `${s[0]}fr`).join(" ");
    } else if (W >= FOCUS) {
      const left = Math.floor(0.62 * (W - GAP)), H = Math.floor(Math.max(180, Math.min(left * high[0] / wide[0], max))), half = Math.floor((H - strip - GAP) / 2);
      size = [[left, H], [W - GAP - left, half], [W - GAP - left, H - strip - GAP - half]];
      stage.style.gridTemplateColumns = `${size[0][0]}px ${size[1][0]}px`;
      panes[0].cell.style.gridRow = "1 / 3";
    } else {
      size = mm.map(([a, b]) => [W, Math.max(60, Math.min(W * b / a, meta.fill ? 1.4 * W : max))]);
      stage.style.gridTemplateColumns = "100%";
    }
    const dpr = el.ownerDocument.defaultView.devicePixelRatio || 1;
    panes.forEach((p) => {
      const [w, v] = size[p.k].map(Math.round);
      p.dpr = dpr;
      p.fit = Math.min(w / mm[p.k][0], v / mm[p.k][1]);
      p.canvas.style.width = `${w}px`; p.canvas.style.height = `${v}px`;
      const W2 = Math.round(w * dpr), H2 = Math.round(v * dpr);
      if (p.canvas.width !== W2 || p.canvas.height !== H2) { p.canvas.width = W2; p.canvas.height = H2; }
    });
    if (W >= ROW && one < 0 && !state.side) { const s = Math.min(...panes.map((p) => p.fit)); panes.forEach((p) => { p.fit = s; }); }
    redraw();
  }
  function solo(i) { look.solo = i; layout(); }
  function zoomBy(f, p, at) {                      // about a place of one plane; the others about the crosshair
    const zoom = f ? Math.max(1, Math.min(12, look.zoom * f)) : 1, ratio = look.zoom / zoom;
    NAMES.forEach((_, k) => {
      const fix = p && k === p.k ? at : [(state.index[ACROSS[k]] + 0.5) * spacing[ACROSS[k]], (rowOf(k, state.index[DOWN[k]]) + 0.5) * spacing[DOWN[k]]];
      look.pan[k] = zoom === 1 ? [mm[k][0] / 2, mm[k][1] / 2] : look.pan[k].map((c, a) => fix[a] + (c - fix[a]) * ratio);
    });
    look.zoom = zoom;
    redraw();
  }
  function follow(p) {                             // a zoomed plane keeps the crosshair in sight when another plane moved it
    const k = p.k, key = state.index.join(), was = p.followed;
    p.followed = key;
    if (look.zoom === 1 || was === key || look.dragging === k) return;
    const t = view(p), x = (state.index[ACROSS[k]] + 0.5) * spacing[ACROSS[k]], y = (rowOf(k, state.index[DOWN[k]]) + 0.5) * spacing[DOWN[k]];
    const px = t.x + x * t.s, py = t.y + y * t.s;
    if (px < 0 || py < 0 || px > p.canvas.width || py > p.canvas.height) look.pan[k] = [x, y];
  }

  // -------------------------------------------------------------- pointer, wheel, keys
  function under(p, e) {                           // plane coordinates in mm, and the voxel there
    const box = p.canvas.getBoundingClientRect(), t = view(p);
    const x = ((e.clientX - box.left) * p.dpr - t.x) / t.s, y = ((e.clientY - box.top) * p.dpr - t.y) / t.s, i = [...state.index];
    const q = Math.floor(x / spacing[ACROSS[p.k]]), r = Math.floor(y / spacing[DOWN[p.k]]), inside = q >= 0 && r >= 0 && q < p.w && r < p.v;
    i[ACROSS[p.k]] = Math.max(0, Math.min(p.w - 1, q));
    i[DOWN[p.k]] = rowOf(p.k, Math.max(0, Math.min(p.v - 1, r)));
    return { at: [x, y], voxel: i, inside };
  }
  function listen(p) {
    const { canvas, k } = p, fingers = new Map();
    let drag = null, armed = null, wheel = 0;
    const point = (e) => { const index = under(p, e).voxel; if (index.join() !== state.index.join()) change({ index }); };
    canvas.addEventListener("pointerdown", (e) => {
      fingers.set(e.pointerId, e);
      canvas.setPointerCapture(e.pointerId);
      const kind = e.button === 2 || e.shiftKey ? "window" : e.button === 1 || e.altKey ? "pan" : "cross";
      drag = { kind: fingers.size > 1 ? "pinch" : kind, x: e.clientX, y: e.clientY, level: state.level, width: state.window, pan: [...look.pan[k]], moved: false };
      look.dragging = k;
      if (e.pointerType !== "touch" && kind === "cross") point(e);
      if (e.pointerType !== "touch") { canvas.focus({ preventScroll: true }); e.preventDefault(); }
    });
    canvas.addEventListener("pointermove", (e) => {
      if (armed && (armed.screenX !== e.screenX || armed.screenY !== e.screenY)) armed = true;
      else armed ||= e;                            // the wheel is ours only once the pointer moved here, so that a page can scroll past
      if (e.pointerType !== "touch" || drag) { const u = under(p, e); look.hover = u.inside ? u.voxel : null; if (!drag) readout(); }
      if (!drag) return;
      const before = fingers.get(e.pointerId), dx = e.clientX - drag.x, dy = e.clientY - drag.y;
      if (fingers.size > 1 && before) {
        const other = [...fingers.values()].find((f) => f.pointerId !== e.pointerId), span = (f) => Math.hypot(f.clientX - other.clientX, f.clientY - other.clientY);
        zoomBy(span(e) / Math.max(1, span(before)), p, under(p, { clientX: (e.clientX + other.clientX) / 2, clientY: (e.clientY + other.clientY) / 2 }).at);
        drag.kind = "pinch";
      } else if (drag.kind === "window") {
        const gain = (e.pointerType === "touch" ? 1 : 2) * range[1] * 255 / 1000;
        setWindow(drag.level + dy * gain, Math.max(range[1], drag.width + dx * gain * 1.5));
      } else if (drag.kind === "pan") {
        const s = p.fit * look.zoom;
        if (look.zoom > 1) { look.pan[k] = [drag.pan[0] - dx / s, drag.pan[1] - dy / s]; redraw(); }
      } else if (drag.kind === "cross" && (e.pointerType !== "touch" || drag.moved || Math.hypot(dx, dy) > 6)) { drag.moved = true; point(e); }
      fingers.set(e.pointerId, e);
    });
    const up = (e) => {
      if (drag?.kind === "cross" && e.type === "pointerup" && e.pointerType === "touch") point(e);
      fingers.delete(e.pointerId);
      if (!fingers.size) { drag = null; look.dragging = -1; if (e.pointerType === "touch") { look.hover = null; readout(); } }
    };
    canvas.addEventListener("pointerup", up);
    canvas.addEventListener("pointercancel", up);
    canvas.addEventListener("pointerleave", () => { armed = null; wheel = 0; look.hover = null; readout(); });
    canvas.addEventListener("contextmenu", (e) => e.preventDefault());
    canvas.addEventListener("mousedown", (e) => { if (e.button === 1) e.preventDefault(); });
    canvas.addEventListener("dblclick", () => solo(look.solo === p.i ? -1 : p.i));
    canvas.addEventListener("wheel", (e) => {
      if (e.ctrlKey || e.metaKey) { e.preventDefault(); zoomBy(Math.exp(-Math.max(-60, Math.min(60, e.deltaY)) / 150), p, under(p, e).at); return; }
      if (armed !== true && el.getRootNode().activeElement !== canvas) return;
      e.preventDefault();
      const d = e.deltaMode ? 100 * Math.sign(e.deltaY) : e.deltaY;
      wheel = Math.sign(d) === Math.sign(wheel) ? wheel + d : d;
      const steps = Math.abs(d) >= 50 ? Math.sign(d) * Math.max(1, Math.round(Math.abs(d) / 120)) : Math.trunc(wheel / 30);
      if (steps) { wheel = 0; go(k, state.index[k] - steps); const u = under(p, e); if (look.hover && u.inside) { look.hover = [...u.voxel]; } }
    }, { passive: false });
    canvas.addEventListener("keydown", (e) => {
      if (e.ctrlKey || e.metaKey || e.altKey) return;
      const i = state.index[k], leap = Math.max(1, Math.round(shape[k] / 10)), names = Object.keys(presets);
      const keys = { ArrowUp: i + 1, ArrowRight: i + 1, ArrowDown: i - 1, ArrowLeft: i - 1, PageUp: i + leap, PageDown: i - leap, Home: 0, End: shape[k] - 1 };
      if (e.key in keys) go(k, keys[e.key]);
      else if (names[e.key - 1]) presetButtons[e.key - 1].click();
      else if (e.key === "c" || e.key === "C") crossButton.click();
      else if (maps.length && (e.key === "b" || e.key === "B") && !state.side) swap();
      else if (maps.length && (e.key === "s" || e.key === "S")) { setSide(state.side ? "" : NAMES[k]); panes[0].canvas.focus(); }
      else if (e.key === "+" || e.key === "=") zoomBy(1.5);
      else if (e.key === "-") zoomBy(1 / 1.5);
      else if (e.key === "0") zoomBy(0);
      else if (e.key === "Escape" && look.solo >= 0) solo(-1);
      else return;
      e.preventDefault(); e.stopPropagation();     // no shortcut of the notebook around us
    });
  }
  root.addEventListener("keydown", (e) => {
    if (e.key === "Escape" && !helpPanel.hidden) { helpButton.click(); helpButton.focus(); }
    e.stopPropagation();
  });

  // -------------------------------------------------------------- changes from Python, and of the room we have
  const onChange = KEYS.map((k) => [`change:${k}`, () => { const v = model.get(k); if (JSON.stringify(v) !== JSON.stringify(state[k])) { state[k] = v; if (k === "side") { look.solo = -1; build(); layout(); } redraw(); } }]);
  onChange.forEach(([e, f]) => model.on(e, f));
  const sized = new ResizeObserver(() => layout());
  sized.observe(root);
  const onWindow = () => layout();
  el.ownerDocument.defaultView.addEventListener("resize", onWindow);
  build();
  layout();
  return () => {
    blink(false);
    onChange.forEach(([e, f]) => model.off(e, f));
    sized.disconnect(); unwatch();
    el.ownerDocument.defaultView.removeEventListener("resize", onWindow);
  };
}

// ------------------------------------------------------------------ a page of its own: no kernel, the voxels lie in the page
async function standalone(el, { state, header, buffers }) {
  const bytes = buffers.map((b) => (typeof b === "string" ? Uint8Array.from(atob(b), (c) => c.charCodeAt(0)) : asBytes(b)));
  const subs = {}, fire = (e, ...a) => [...(subs[e] || [])].forEach((f) => f(...a));
  const end = await render({ el, model: {
    get: (k) => state[k], set: (k, v) => { state[k] = v; }, save_changes() {},
    on: (e, f) => { (subs[e] ||= []).push(f); }, off: (e, f) => { subs[e] = (subs[e] || []).filter((g) => g !== f); },
    send: () => setTimeout(() => fire("msg:custom", header, bytes)),
  } });
  try {                                            // in a frame of ours: be as tall as the viewer, and take the still's place
    const frame = window.frameElement;
    if (!frame?.dataset.covidCt) return end;
    const fit = () => { frame.style.height = `${Math.ceil(el.getBoundingClientRect().height)}px`; };
    frame.style.position = "static"; frame.style.display = "block";
    for (const img of frame.parentElement.querySelectorAll("img")) img.hidden = true, img.style.display = "none";
    new ResizeObserver(fit).observe(el);
    fit();
  } catch { /* another origin holds the frame: its height stays as it was */ }
  return end;
}

export default { render, standalone, cut, cutBetween, profile, greys, ramp, outline, place };
