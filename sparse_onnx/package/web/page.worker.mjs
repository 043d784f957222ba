// The model's side of the page: checks the package's files, loads the model, generates. Messages in: {do}; out: {is}.
const at = (name) => new URL(name, import.meta.url).href;
const said = (error) => String(error?.message ?? error).split(/\s+/).join(' ').slice(0, 300);
class Refusal extends Error {}
const refuse = (message) => { throw new Refusal(message); };
const breathe = () => new Promise((resolve) => {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = () => { port1.close(); resolve(); };
  port2.postMessage(null);
});

let [manifest, page, ort, session] = [];
let stopped = false;
const unchecked = [];

async function fetched(name, missing) {
  let response;
  try { response = await fetch(at(name), { cache: 'no-cache' }); }
  catch (error) { return refuse(`${name} cannot be fetched: ${said(error)}`); }
  if (response.status === 404) refuse(missing);
  if (!response.ok) refuse(`${name} cannot be fetched: the server answers ${response.status}`);
  return new Uint8Array(await response.arrayBuffer());
}

async function checked(name, missing = `${name} is missing: copy the package again`) {
  const known = manifest.files[name];
  postMessage({ is: 'loading', name, bytes: known?.bytes });
  const bytes = await fetched(name, missing);
  if (!known) {
    unchecked.push(name);
    return bytes;
  }
  if (bytes.length !== known.bytes) refuse(`${name} has ${bytes.length} bytes instead of ${known.bytes}: copy it again`);
  if (!globalThis.crypto?.subtle) return bytes;
  const hash = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
  const digits = Array.from(hash, (byte) => byte.toString(16).padStart(2, '0')).join('');
  if (digits !== known.sha256) refuse(`${name} is damaged: its sha256 is not that of manifest.json; copy it again`);
  return bytes;
}

const arrays = {
  float32: Float32Array, float64: Float64Array, int8: Int8Array, uint8: Uint8Array, bool: Uint8Array, int16: Int16Array,
  uint16: Uint16Array, int32: Int32Array, uint32: Uint32Array, int64: BigInt64Array, uint64: BigUint64Array,
};

async function load() {
  const text = new TextDecoder().decode(await fetched('manifest.json', 'manifest.json is missing: copy the package again'));
  try { manifest = JSON.parse(text); }
  catch (error) { refuse(`manifest.json cannot be read: ${said(error)}`); }
  if (manifest.schema !== 1) refuse(`manifest.json has schema ${manifest.schema}, and this page reads 1`);
  page = manifest.page ?? refuse('manifest.json describes no page');
  const { package: library, version, module, wasm } = page.runtime;
  const names = [module, wasm].map((name) => name.split('/').at(-1)).join(' and ');
  const missing = `${library} is not here: put ${names} of npm's ${library} ${version}, dist/, into ${library}/`;
  await checked(module, missing);
  const binary = await checked(wasm, missing);
  ort = await import(at(module));
  const have = ort.env.versions.web ?? ort.env.versions.common;
  const [one, two] = [have, manifest.onnxruntime.minimum].map((each) => each.match(/\d+/g).map(Number));
  if (one[0] < two[0] || (one[0] === two[0] && one[1] < (two[1] ?? 0))) {
    refuse(`${library} ${have} is too old: ${manifest.onnxruntime.minimum} or newer is needed`);
  }
  if (page.provider === 'webgpu' && !(await navigator.gpu?.requestAdapter())) {
    refuse('this browser has no WebGPU: package the model with --target wasm');
  }
  const data = [];
  for (const name of page.data) data.push({ path: name, data: await checked(name) });
  const model = await checked(page.model);
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = binary;
  const options = { executionProviders: [page.provider], externalData: data, logSeverityLevel: 3, extra: {} };
  for (const [key, value] of Object.entries(manifest.config)) {
    const words = key.split('.');
    let inner = options.extra;
    for (const word of words.slice(0, -1)) inner = inner[word] ??= {};
    inner[words.at(-1)] = value;
  }
  postMessage({ is: 'loading', name: 'the session' });
  session = await ort.InferenceSession.create(model, options);
  const error = await smoke();
  if (!(error <= manifest.smoke.tolerance)) {
    refuse(`the model's outputs are off by ${error.toPrecision(2)} here, and ${manifest.smoke.tolerance} is allowed`);
  }
  postMessage({
    is: 'ready', experts: page.experts, provider: page.provider, library: `${library} ${have}`, error,
    hashed: Boolean(globalThis.crypto?.subtle), unchecked, bytes: manifest.memory.weight_bytes,
  });
}

// The largest error of the smoke input's scores, relative to their largest magnitude.
async function smoke() {
  const feeds = {};
  const stored = async ({ type, file }) => new arrays[type]((await checked(file)).buffer);
  for (const item of manifest.smoke.inputs) feeds[item.name] = new ort.Tensor(item.type, await stored(item), item.shape);
  const want = await stored(manifest.smoke.outputs.find((item) => item.name === page.scores));
  const got = (await session.run(feeds, [page.scores]))[page.scores].data;
  let [worst, scale] = [got.length === want.length ? 0 : Infinity, 1e-6];
  for (let number = 0; number < want.length; number++) {
    const off = Math.abs(got[number] - want[number]);
    worst = Math.max(worst, Number.isNaN(off) ? Infinity : off);
    scale = Math.max(scale, Math.abs(want[number]));
  }
  return worst / scale;
}

// Scores of what follows the ids, and of each id from `from` on the experts it used: [layer][slot].
async function step(ids, from) {
  const whole = page.type === 'int64' ? BigInt64Array.from(ids, BigInt) : Int32Array.from(ids);
  const results = await session.run({ [page.input]: new ort.Tensor(page.type, whole, [1, ids.length]) });
  const scores = results[page.scores].data.subarray((ids.length - 1) * page.vocabulary);
  const rows = [];
  for (let token = from; token < ids.length; token++) {
    rows.push(page.experts.map(({ output, experts }) => {
      const chosen = results[output].data;
      const slots = chosen.length / ids.length;
      return Array.from(chosen.subarray(token * slots, (token + 1) * slots), Number).filter((expert) => expert < experts);
    }));
  }
  return { scores, rows };
}

function picked(scores, temperature) {
  let best = 0;
  for (let id = 1; id < scores.length; id++) if (scores[id] > scores[best]) best = id;
  if (!temperature) return best;
  const odds = Array.from(scores, (score) => Math.exp((score - scores[best]) / temperature));
  let left = Math.random() * odds.reduce((sum, each) => sum + each, 0);
  for (let id = 0; id < odds.length; id++) if ((left -= odds[id]) < 0) return id;
  return best;
}

async function generate({ prompt, length, temperature }) {
  stopped = false;
  const ids = [...prompt];
  let [shown, made] = [0, 0];
  const start = performance.now();
  for (;;) {
    const { scores, rows } = await step(ids, shown);
    postMessage({ is: 'experts', from: shown, rows });
    shown = ids.length;
    await breathe();
    if (stopped || made === length) break;
    ids.push(picked(scores, temperature));
    made += 1;
    postMessage({ is: 'token', id: ids.at(-1), made, seconds: (performance.now() - start) / 1000 });
  }
  postMessage({ is: 'done', made, seconds: (performance.now() - start) / 1000, stopped });
}

onmessage = async ({ data }) => {
  if (data.do === 'stop') { stopped = true; return; }
  try {
    await (data.do === 'load' ? load() : generate(data));
  } catch (error) {
    const text = error instanceof Refusal ? error.message : `the model cannot be run here: ${said(error)}`;
    postMessage({ is: 'error', text });
  }
};
