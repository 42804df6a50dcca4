// @vladmandic/face-api in its documented chain: detection, landmarks (which align the face), expressions.
// Argument: ssd (its default detector) or tiny.
const path = require('path');
const tf = require('@tensorflow/tfjs');
const wasm = require('@tensorflow/tfjs-backend-wasm');
const faceapi = require('@vladmandic/face-api/dist/face-api.node-wasm.js');
const { answer, decode, folderOf } = require('./loop.js');

const detectors = {
  ssd: ['ssdMobilenetv1', 'ssd_mobilenetv1', new faceapi.SsdMobilenetv1Options()],
  tiny: ['tinyFaceDetector', 'tiny_face_detector', new faceapi.TinyFaceDetectorOptions()],
};

async function main() {
  const [net, name, options] = detectors[process.argv[2]];
  wasm.setWasmPaths(path.join(folderOf('@tensorflow/tfjs-backend-wasm'), 'dist/'));
  wasm.setThreadsCount(1);
  await tf.setBackend('wasm');
  await tf.ready();
  const models = path.join(folderOf('@vladmandic/face-api'), 'model');
  for (const one of [net, 'faceLandmark68Net', 'faceExpressionNet']) await faceapi.nets[one].loadFromDisk(models);
  const files = [name, 'face_landmark_68', 'face_expression'].map((one) => path.join(models, `${one}_model.bin`));

  await answer(['@vladmandic/face-api', '@tensorflow/tfjs', '@tensorflow/tfjs-backend-wasm'], files, async (file, given) => {
    const { data, info } = await decode(file);
    const pixels = tf.tensor3d(data, [info.height, info.width, 3], 'int32');
    try {
      if (given) return [{ area: 1, scores: { ...(await faceapi.nets.faceExpressionNet.predictExpressions(pixels)) } }];
      const faces = await faceapi.detectAllFaces(pixels, options).withFaceLandmarks().withFaceExpressions();
      return faces.map((face) => ({ area: face.detection.box.area, scores: { ...face.expressions } }));
    } finally {
      pixels.dispose();
    }
  });
}

main();
