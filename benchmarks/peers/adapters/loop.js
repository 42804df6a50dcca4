// The conversation with run.py: a line of JSON in for each photograph, a line of JSON out.
const fs = require('fs');
const path = require('path');
const readline = require('readline');
const sharp = require('sharp');

const folderOf = (name) => path.join(process.env.NODE_PATH, name);
const packageOf = (name) => JSON.parse(fs.readFileSync(path.join(folderOf(name), 'package.json')));

// The decoded pixels of a file: { data, info: { width, height } }, RGB.
const decode = (file) =>
  sharp(fs.readFileSync(file)).removeAlpha().toColourspace('srgb').raw().toBuffer({ resolveWithObject: true });

// read(file, given) -> [{ area, scores: { happy, neutral, ... } }], one for each face.
async function answer(packages, files, read) {
  sharp.concurrency(1);
  const versions = Object.fromEntries([...packages, 'sharp'].map((name) => [name, packageOf(name).version]));
  const licence = packageOf(packages[0]).license;
  console.log(JSON.stringify({ versions: { ...versions, node: process.version }, licence, files }));
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const { path: file, given } = JSON.parse(line);
    const wall = performance.now();
    const cpu = process.cpuUsage();
    const faces = await read(file, given);
    const used = process.cpuUsage(cpu);
    const ms = performance.now() - wall;
    const cpuMs = (used.user + used.system) / 1000;
    const scores = faces.sort((one, other) => other.area - one.area)[0]?.scores;
    const first = scores && Object.keys(scores).reduce((one, other) => (scores[other] > scores[one] ? other : one));
    console.log(JSON.stringify({
      path: file, faces: faces.length, p_happy: scores?.happy ?? null, p_neutral: scores?.neutral ?? null,
      own_answer: first ?? null, ms, cpu_ms: cpuMs,
    }));
  }
}

module.exports = { answer, decode, folderOf };
