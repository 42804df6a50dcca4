// @vladmandic/human in its default configuration, without the models that do not touch the emotion (iris, description).
// Nothing is kept from one photograph to the next, as it is by default for video.
const fs = require('fs');
const path = require('path');
const wasm = require('@tensorflow/tfjs-backend-wasm');
const { answer, decode, folderOf } = require('./loop.js');

const folder = folderOf('@vladmandic/human');
// TensorFlow.js reads models with fetch, which knows no files in Node.
const fetchUrl = globalThis.fetch;
globalThis.fetch = async (url, options) =>
  (String(url).startsWith('file://') ? new Response(fs.readFileSync(new URL(url))) : fetchUrl(url, options));
const { Human } = require(path.join(folder, 'dist', 'human.node-wasm.js'));

async function main() {
  wasm.setThreadsCount(1);
  const off = { enabled: false };
  const human = new Human({
    backend: 'wasm',
    wasmPath: path.join(folderOf('@tensorflow/tfjs-backend-wasm'), 'dist/'),
    modelBasePath: `file://${folder}/models/`,
    debug: false,
    cacheSensitivity: 0,
    skipAllowed: false,
    body: off,
    hand: off,
    object: off,
    gesture: off,
    face: { iris: off, description: off, emotion: { minConfidence: 0 } },
  });
  await human.load();
  const files = ['blazeface', 'facemesh', 'emotion'].map((name) => path.join(folder, 'models', `${name}.bin`));

  await answer(['@vladmandic/human', '@tensorflow/tfjs', '@tensorflow/tfjs-backend-wasm'], files, async (file) => {
    const { data, info } = await decode(file);
    const pixels = human.tf.tensor4d(data, [1, info.height, info.width, 3], 'int32');
    const { face } = await human.detect(pixels);
    pixels.dispose();
    return face.map(({ box, emotion }) => ({
      area: box[2] * box[3], scores: Object.fromEntries(emotion.map((one) => [one.emotion, one.score])),
    }));
  });
}

main();
