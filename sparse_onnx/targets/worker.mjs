// The same requests as worker.py, by onnxruntime-web or onnxruntime-node: node worker.mjs FOLDER PACKAGE FD
import fs from 'node:fs';
import readline from 'node:readline';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const [folder, name, fd] = process.argv.slice(2);
const resolve = createRequire(pathToFileURL(`${folder}/package.json`).href);
const web = name === 'onnxruntime-web';
const loaded = web ? await import(pathToFileURL(resolve.resolve(name)).href) : resolve(name);
const ort = loaded.default ?? loaded;
if (web) ort.env.wasm.numThreads = 1;

const arrays = {
  float32: Float32Array, float64: Float64Array, int8: Int8Array, uint8: Uint8Array, bool: Uint8Array,
  int16: Int16Array, uint16: Uint16Array, float16: Uint16Array, int32: Int32Array, uint32: Uint32Array,
  int64: BigInt64Array, uint64: BigUint64Array,
};
const sessions = [];

const verbs = {
  async create({ model, providers, config, optimize }) {
    const options = { executionProviders: providers.map(([provider]) => provider), logSeverityLevel: 4 };
    if (!optimize) options.graphOptimizationLevel = 'disabled';
    if (Object.keys(config).length) options.extra = config;
    const session = await ort.InferenceSession.create(web ? new Uint8Array(fs.readFileSync(model)) : model, options);
    const described = (list) => list.map((each) => [each.name, each.type ?? '', [...(each.shape ?? [])]]);
    sessions.push(session);
    return {
      id: sessions.length - 1,
      inputs: described(session.inputMetadata),
      outputs: described(session.outputMetadata),
      version: ort.env.versions.common,
    };
  },
  async run({ id, feeds, folder: out }) {
    const tensors = {};
    for (const [input, type, shape, file] of feeds) {
      const bytes = fs.readFileSync(file);
      const aligned = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
      tensors[input] = new ort.Tensor(type, new arrays[type](aligned), shape);
    }
    const results = await sessions[id].run(tensors);
    const outputs = sessions[id].outputNames.map((output, number) => {
      const { type, dims, data } = results[output];
      const file = `${out}/o${number}`;
      fs.writeFileSync(file, new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
      return [type, [...dims], file];
    });
    return { outputs };
  },
  async placement() {
    return { recorded: null, profiled: null };
  },
  async close({ id }) {
    await sessions[id].release();
    sessions[id] = null;
    return {};
  },
};

for await (const line of readline.createInterface({ input: process.stdin })) {
  const { do: verb, ...rest } = JSON.parse(line);
  let reply;
  try {
    reply = await verbs[verb](rest);
  } catch (error) {
    reply = { error: String(error?.message ?? error), kind: 'Error' };
  }
  fs.writeSync(Number(fd), `${JSON.stringify(reply)}\n`);
}
