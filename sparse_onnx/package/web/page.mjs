// The page's side: what is asked of the worker, and what it shows. Each byte is a row, each layer a group of cells.
const $ = (id) => document.getElementById(id);
const [form, stop, status, text, speed, table, body, detail] =
  ['form', 'stop', 'status', 'text', 'speed', 'table', 'rows', 'detail'].map($);
const box = $('scroll');
const worker = new Worker(new URL('page.worker.mjs', import.meta.url), { type: 'module' });
const NAMES = { 9: '⇥', 10: '⏎', 13: '␍', 32: '␣' };
const SPOKEN = { 9: 'tab', 10: 'line end', 13: 'carriage return', 32: 'space' };

let layers = [];
let ids = [];
let fromPrompt = 0;
let follow = true;
let utf8;

const visible = (id) => NAMES[id] ?? (id > 32 && id < 127 ? String.fromCharCode(id) : id.toString(16).padStart(2, '0'));
const spoken = (id) => SPOKEN[id] ?? (id > 32 && id < 127 ? String.fromCharCode(id) : `byte ${id}`);
const hue = (expert, count) => Math.round((360 * expert) / count);

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function say(message, wrong = false) {
  status.textContent = message;
  status.classList.toggle('wrong', wrong);
  status.setAttribute('role', wrong ? 'alert' : 'status');
}

function busy(running) {
  $('generate').disabled = running;
  stop.disabled = !running;
  $('output').setAttribute('aria-busy', String(running));
}

// So many places in a line; what is in them says where it lies.
function cells(experts, filled, kind) {
  const made = element('span', { className: `cells ${kind}`, ariaHidden: 'true' }, ...filled);
  made.style.setProperty('--experts', experts);
  return made;
}

function head() {
  const row = element('tr', {}, element('th', { scope: 'col', textContent: 'byte' }));
  layers.forEach(({ block, experts }, number) => {
    const cell = element('th', { scope: 'col', title: block }, element('span', { textContent: `layer ${number}` }));
    const digits = Array.from({ length: experts }, (_, expert) => element('i', { textContent: expert }));
    cell.append(cells(experts, digits, 'numbers'));
    row.append(cell);
  });
  table.tHead.replaceChildren(row);
}

// A row before its experts are known; `fill` colours it.
function add(id) {
  const name = element('th', { scope: 'row', textContent: visible(id) });
  name.setAttribute('aria-label', spoken(id));
  const row = element('tr', { tabIndex: body.rows.length ? -1 : 0, className: ids.length < fromPrompt ? 'prompt' : '' }, name);
  ids.push(id);
  body.append(row);
}

function fill(row, chosen) {
  chosen.forEach((used, layer) => {
    const { experts } = layers[layer];
    const coloured = used.map((expert) => {
      const made = element('i', { textContent: expert });
      made.style.gridColumn = expert + 1;
      made.style.setProperty('--hue', hue(expert, experts));
      return made;
    });
    const words = element('span', { className: 'spoken', textContent: used.length ? `experts ${used.join(', ')}` : 'none' });
    row.append(element('td', {}, cells(experts, coloured, 'used'), words));
  });
  row.dataset.experts = JSON.stringify(chosen);
}

function describe(row) {
  if (!row?.dataset.experts) return;
  const used = JSON.parse(row.dataset.experts).map((each, layer) => `layer ${layer}: ${each.join(', ') || 'none'}`);
  const id = ids[row.sectionRowIndex];
  detail.textContent = `Byte ${row.sectionRowIndex + 1}, ${spoken(id)} (${id}). Experts of ${used.join('; ')}.`;
}

const received = {
  loading({ name, bytes }) { say(`Loading ${name}${bytes ? ` (${(bytes / 1e6).toFixed(1)} MB)` : ''} …`); },
  ready({ experts, provider, library, error, hashed, unchecked, bytes }) {
    layers = experts;
    head();
    const all = hashed ? 'files checked' : 'only the sizes of files checked, for sha256 needs https or localhost';
    const how = unchecked.length ? `${all}, but for ${unchecked.join(' and ')}` : all;
    say(`Ready: ${(bytes / 1e6).toFixed(1)} MB of weights, ${library} on ${provider}; ${how}, outputs right ` +
      `(error ${error.toPrecision(2)}).`);
    $('controls').disabled = false;
    busy(false);
  },
  token({ id, made, seconds }) {
    text.append(utf8.decode(Uint8Array.of(id), { stream: true }));
    add(id);
    speed.textContent = `${made} bytes, ${(made / seconds).toFixed(1)} a second`;
  },
  experts({ from, rows }) {
    rows.forEach((chosen, number) => fill(body.rows[from + number], chosen));
    if (follow) box.scrollTop = box.scrollHeight;
  },
  done({ made, stopped }) {
    text.append(utf8.decode());
    say(`${stopped ? 'Stopped' : 'Done'} after ${made} bytes.`);
    busy(false);
    if (document.activeElement === document.body) $('generate').focus();
  },
  error({ text: message }) {
    say(message, true);
    busy(false);
  },
};
worker.onmessage = ({ data }) => received[data.is](data);
worker.onerror = (event) => { event.preventDefault(); say(`page.worker.mjs cannot be run: ${event.message ?? 'missing'}`, true); };

form.addEventListener('submit', (event) => {
  event.preventDefault();
  const prompt = new TextEncoder().encode($('prompt').value);
  [ids, fromPrompt, utf8, follow] = [[], prompt.length, new TextDecoder('utf-8'), true];
  body.replaceChildren();
  detail.textContent = 'Choose a row to read its experts here.';
  text.replaceChildren(element('b', { textContent: $('prompt').value }));
  speed.textContent = '';
  for (const id of prompt) add(id);
  busy(true);
  say('Generating …');
  const temperature = $('greedy').checked ? 0 : Number($('temperature').value);
  worker.postMessage({ do: 'generate', prompt, length: Number($('length').value), temperature });
});
stop.addEventListener('click', () => worker.postMessage({ do: 'stop' }));
function temperatures() {
  $('temperature').disabled = $('greedy').checked;
  $('degrees').textContent = Number($('temperature').value).toFixed(1);
}
form.addEventListener('input', temperatures);
temperatures();

box.addEventListener('scroll', () => { follow = box.scrollHeight - box.scrollTop - box.clientHeight < 60; });
body.addEventListener('click', ({ target }) => target.closest('tr')?.focus());
body.addEventListener('mouseover', ({ target }) => describe(target.closest('tr')));
body.addEventListener('focusin', ({ target }) => {
  for (const row of body.querySelectorAll('tr[tabindex="0"]')) row.tabIndex = -1;
  target.tabIndex = 0;
  describe(target);
});
body.addEventListener('keydown', (event) => {
  const row = event.target.closest('tr');
  const moves = {
    ArrowDown: row.nextElementSibling, ArrowUp: row.previousElementSibling,
    Home: body.firstElementChild, End: body.lastElementChild,
  };
  if (moves[event.key]) { event.preventDefault(); moves[event.key].focus(); }
});

worker.postMessage({ do: 'load' });
