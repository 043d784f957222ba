// Checks the package that it lies in, and runs its smoke input: node run.mjs [--web] [--variant NAME]
//
// With onnxruntime-node, or with onnxruntime-web's WebAssembly (--web, or where the former is not installed); packages are
// looked for from this folder upwards, and in NODE_PATH.
// Exit codes: 0 right; 1 the model cannot be run; 2 usage; 3 a file is missing or damaged; 4 other outputs than expected;
// 5 ONNX Runtime is missing or too old.
import crypto from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { createRequire } from 'node:module';
import { fileURLToPath, pathToFileURL } from 'node:url';

const folder = path.dirname(fileURLToPath(import.meta.url));
const at = (name) => path.join(folder, name);
const fail = (code, message) => { console.error(`error: ${message}`); process.exit(code); };
const said = (error) => String(error?.message ?? error).split(/\s+/).join(' ').slice(0, 300);

let manifest;
try { manifest = JSON.parse(fs.readFileSync(at('manifest.json'), 'utf8')); }
catch (error) { fail(3, `manifest.json cannot be read: ${said(error)}`); }
if (manifest.schema !== 1) fail(5, `manifest.json has schema ${manifest.schema}, and this runner reads 1`);

async function sha256(file) {
  const hash = crypto.createHash('sha256');
  for await (const block of fs.createReadStream(file)) hash.update(block);
  return hash.digest('hex');
}
for (const [name, known] of Object.entries(manifest.files)) {
  const size = fs.statSync(at(name), { throwIfNoEntry: false })?.size;
  if (size === undefined) fail(3, `${name} is missing: copy the package again`);
  if (size !== known.bytes) fail(3, `${name} has ${size} bytes instead of ${known.bytes}: copy it again`);
  if (await sha256(at(name)) !== known.sha256) {
    fail(3, `${name} is damaged: its sha256 is not that of manifest.json; copy it again`);
  }
}

async function runtime() {
  const { resolve } = createRequire(import.meta.url);
  const names = process.argv.includes('--web') ? ['onnxruntime-web'] : ['onnxruntime-node', 'onnxruntime-web'];
  for (const name of names) {
    let found;
    try { found = resolve(name); } catch { continue; }
    const loaded = await import(pathToFileURL(found).href);
    return { name, ort: loaded.default ?? loaded };
  }
  return fail(5, `${names.join(' or ')} is not installed: npm install ${names[0]}`);
}
const { name: library, ort } = await runtime();
const web = library === 'onnxruntime-web';
const numbers = (version) => (version.match(/\d+/g) ?? []).map(Number);
const versions = ort.env.versions;
const version = (web ? versions.web : versions.node) ?? versions.common;
const [have, need] = [numbers(version), numbers(manifest.onnxruntime.minimum)];
if (have[0] < need[0] || (have[0] === need[0] && have[1] < (need[1] ?? 0))) {
  fail(5, `${library} ${version} is too old: ${manifest.onnxruntime.minimum} or newer is needed`);
}

const asked = process.argv.indexOf('--variant');
const variant = asked < 0 ? manifest.variants[0] : manifest.variants.find((each) => each.name === process.argv[asked + 1]);
if (!variant) fail(2, `there is no variant '${process.argv[asked + 1]}'`);

const arrays = {
  float32: Float32Array, float64: Float64Array, int8: Int8Array, uint8: Uint8Array, bool: Uint8Array, int16: Int16Array,
  uint16: Uint16Array, float16: Uint16Array, int32: Int32Array, uint32: Uint32Array, int64: BigInt64Array,
  uint64: BigUint64Array,
};
function stored({ type, file }) {
  const bytes = fs.readFileSync(at(file));
  return new arrays[type](bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
}
function half(bits) {
  const [sign, exponent, fraction] = [bits & 0x8000 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}
// The largest error relative to the largest finite magnitude expected; integers must be equal.
function error(got, want, type) {
  if (got.length !== want.length) return Infinity;
  const floats = type.startsWith('float');
  const read = (array, number) => {
    const value = array[number];
    return type === 'float16' && array instanceof Uint16Array ? half(value) : value;
  };
  let [worst, scale] = [0, 1e-6];
  for (let number = 0; number < want.length; number++) {
    const [one, two] = [read(got, number), read(want, number)];
    if (!floats || !Number.isFinite(two)) {
      if (one !== two && !Object.is(one, two)) return Infinity;
    } else if (!Number.isFinite(one)) {
      return Infinity;
    } else {
      worst = Math.max(worst, Math.abs(one - two));
      scale = Math.max(scale, Math.abs(two));
    }
  }
  return worst / scale;
}

let results;
try {
  const options = { logSeverityLevel: 3, extra: {} };
  for (const [key, value] of Object.entries(manifest.config)) {
    const words = key.split('.');
    let inner = options.extra;
    for (const word of words.slice(0, -1)) inner = inner[word] ??= {};
    inner[words.at(-1)] = value;
  }
  if (web) {
    ort.env.wasm.numThreads = 1;
    options.executionProviders = ['wasm'];
    options.externalData = variant.data.map((name) => ({ path: name, data: new Uint8Array(fs.readFileSync(at(name))) }));
  } else {
    options.executionProviders = [manifest.providers.javascript[0] === 'wasm' ? 'cpu' : manifest.providers.javascript[0]];
  }
  const model = at(variant.model);
  const session = await ort.InferenceSession.create(web ? new Uint8Array(fs.readFileSync(model)) : model, options);
  const feeds = {};
  for (const item of manifest.smoke.inputs) feeds[item.name] = new ort.Tensor(item.type, stored(item), item.shape);
  results = await session.run(feeds);
} catch (error) {
  fail(1, `${variant.model} cannot be run by ${library} ${version}: ${said(error)}`);
}
let worst = 0;
for (const item of manifest.smoke.outputs) {
  const { type, dims, data } = results[item.name];
  const same = type === item.type && dims.join() === item.shape.join();
  const found = same ? error(data, stored(item), type) : Infinity;
  if (!(found <= manifest.smoke.tolerance)) {
    fail(4, `output '${item.name}' is off by ${found.toPrecision(2)}, and ${manifest.smoke.tolerance} is allowed`);
  }
  worst = Math.max(worst, found);
}
console.log(`ok: ${variant.name} (${variant.model}), error ${worst.toPrecision(2)}, on ${library} ${version}`);
process.exit(0);
