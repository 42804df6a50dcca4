/**
 * The page at `/`: a photograph in, what the service says of its faces out. Nothing is stored, here or there.
 *
 * All addresses are relative to the page's, which a proxy may have put below a prefix.
 */

import { faceAnswer, faceChoice, faceSummary } from "./answer.js";
import { closeCamera, openCamera, takeStill } from "./camera.js";
import { counted, element } from "./dom.js";
import { modelCard } from "./model.js";

const FORMATS = ["image/jpeg", "image/png", "image/webp"];
const RETRIABLE = new Set([408, 429, 500, 502, 503, 504]);
const THUMBNAIL_PX = 96;
const ROOM_ABOVE = 0.15;
const UNREACHABLE = {
  title: "No answer",
  detail: "The service could not be reached, or the connection broke off.",
  hint: "Check that it is running and try again.",
};

const part = (id) => document.getElementById(id);
const [stage, frame, photo, boxes, video] = ["stage", "frame", "photo", "boxes", "video"].map(part);

let picture = null; // The Blob that was chosen.
let asking = null; // The AbortController of the request in flight.
let info = null; // What /v1/model said, or null.
let stream = null; // The camera's, while it runs.
let cameraTurn = 0; // Counts starts and stops: a camera that opens after it was given up is closed at once.

function say(text, { quiet = false } = {}) {
  part("status").textContent = text;
  part("status").classList.toggle("unseen", quiet);
}

function clearResult() {
  asking?.abort();
  part("about").hidden = true;
  part("problem").replaceChildren();
  part("answer").replaceChildren();
  boxes.replaceChildren();
}

function show(what) {
  part("empty").hidden = what !== "empty";
  frame.hidden = what !== "photo";
  part("unseen").hidden = what !== "unseen";
  video.hidden = what !== "camera";
  part("camera-start").hidden = what === "camera";
  part("camera-take").hidden = what !== "camera";
  part("camera-stop").hidden = what !== "camera";
}

async function open(blob) {
  stopCamera();
  clearResult();
  picture = blob;
  URL.revokeObjectURL(photo.src);
  photo.src = URL.createObjectURL(blob);
  show("photo");
  const shown = photo.decode().then(
    () => fitFrame(photo.naturalWidth, photo.naturalHeight),
    () => picture === blob && show("unseen"),
  );
  await ask(shown);
}

function fitFrame(width, height) {
  frame.style.setProperty("--width", `${width}px`);
  frame.style.setProperty("--ratio", width / height);
}

/** Ask the service about the picture; `shown` is settled when the browser has read it, too. */
async function ask(shown) {
  clearResult();
  const mine = (asking = new AbortController());
  part("result").setAttribute("aria-busy", "true");
  say("Reading the photograph …");
  try {
    const outcome = await predict(mine.signal);
    await shown;
    if (mine.signal.aborted) return;
    if (outcome.answer) showAnswer(outcome.answer);
    else showProblem(outcome.problem, outcome.retryAfter);
    document.querySelector("#answer .headline, #problem .note")?.scrollIntoView({ block: "nearest" });
  } catch (error) {
    if (mine.signal.aborted) return;
    showProblem({ ...UNREACHABLE, status: 503 });
  } finally {
    if (mine === asking) part("result").removeAttribute("aria-busy");
  }
}

async function predict(signal) {
  const faces = document.querySelector("input[name=faces]:checked").value;
  const headers = { "Content-Type": FORMATS.includes(picture.type) ? picture.type : "application/octet-stream" };
  if (part("key").value) headers.Authorization = `Bearer ${part("key").value}`;
  const query = new URLSearchParams({ faces, return_distribution: true });
  const response = await fetch(`v1/predict?${query}`, { method: "POST", headers, body: picture, signal });
  const isJson = response.headers.get("Content-Type")?.includes("json");
  if (response.ok && isJson) return { answer: await response.json() };
  const unknown = { title: `Status ${response.status}`, detail: "The answer is none of this service's.", hint: UNREACHABLE.hint };
  const problem = { ...(isJson ? await response.json() : unknown), status: response.status };
  return { problem, retryAfter: response.headers.get("Retry-After") };
}

function showAnswer(answer) {
  const [result] = answer.results;
  const detail = element("div");
  const choose = (index, spoken = true) => {
    const same = info?.model.sha256 === answer.model.sha256;
    detail.replaceChildren(faceAnswer(answer, result, index, same ? info : null));
    for (const [at, box] of [...boxes.children].entries()) box.classList.toggle("chosen", at === index);
    if (spoken) say(`Face ${index + 1}: ${faceSummary(result.faces[index])}.`, { quiet: true });
  };
  if (part("unseen").hidden) boxes.replaceChildren(...result.faces.map((face, index) => boxOf(face, index, result)));
  part("answer").replaceChildren(...choice(result, choose), detail);
  choose(0, false);
  say(`${counted(result.faces.length, "face")} found. The largest: ${faceSummary(result.faces[0])}.`, { quiet: true });
  if (answer.model.sha256 !== info?.model.sha256) loadModel().then(() => detail.isConnected && choose(chosenIndex(), false));
}

function choice(result, choose) {
  const parts = result.faces.length > 1 ? [faceChoice(result, thumbnail(result), choose)] : [];
  if (result.faces_left_out) {
    const text = `${counted(result.faces_left_out, "smaller face")} beyond this service's limit: nothing is said of them.`;
    parts.push(element("p", { class: "note" }, text));
  }
  return parts;
}

function chosenIndex() {
  const radios = [...document.getElementsByName("face")];
  return Math.max(0, radios.findIndex((radio) => radio.checked));
}

/** A face's box over the photograph, in shares of its sides, so that it fits at every size. */
function boxOf({ box }, index, { width, height, faces }) {
  const made = element("div", { class: "box" });
  made.style.left = `${(100 * box.x) / width}%`;
  made.style.top = `${(100 * box.y) / height}%`;
  made.style.width = `${(100 * box.width) / width}%`;
  made.style.height = `${(100 * box.height) / height}%`;
  // The number stands above the face, so that it hides nothing of it; below, where there is no room above.
  made.classList.toggle("high", box.y < ROOM_ABOVE * height);
  if (faces.length > 1) {
    made.append(element("span", {}, `${index + 1}`));
    made.addEventListener("click", () => document.getElementsByName("face")[index].click());
  }
  return made;
}

function thumbnail({ width, height }) {
  return ({ box }) => {
    const canvas = element("canvas", { width: THUMBNAIL_PX, height: THUMBNAIL_PX, "aria-hidden": "true" });
    if (photo.naturalWidth === 0) return canvas;
    const [across, down] = [photo.naturalWidth / width, photo.naturalHeight / height];
    const source = [box.x * across, box.y * down, box.width * across, box.height * down];
    canvas.getContext("2d").drawImage(photo, ...source, 0, 0, THUMBNAIL_PX, THUMBNAIL_PX);
    return canvas;
  };
}

function hintOf(problem, retryAfter) {
  if (/^\d+$/.test(retryAfter ?? "")) return `Try again in ${counted(Number(retryAfter), "second")}.`;
  // The service's own hint names a header, which is of no use here.
  if (problem.type === "/problems/key_needed") return "Enter one in the field “Key of this service”.";
  return problem.hint;
}

function showProblem(problem, retryAfter = null) {
  say("", { quiet: true });
  const parts = [
    element("h3", {}, problem.title),
    element("p", {}, problem.detail),
    element("p", {}, hintOf(problem, retryAfter)),
    ...remedies(problem),
  ];
  if (problem.type) {
    const about = element("a", { href: `.${problem.type}` }, "About this problem");
    const request = problem.request_id ? [" · request ", element("code", {}, problem.request_id)] : [];
    parts.push(element("p", { class: "small muted" }, about, ...request));
  }
  part("problem").replaceChildren(element("div", { class: "note" }, ...parts));
  if (problem.status === 401) {
    part("key-form").hidden = false;
    part("key").focus();
  }
}

function remedies(problem) {
  const button = (text, act) => {
    const made = element("button", { type: "button" }, text);
    made.addEventListener("click", act);
    return element("p", {}, made);
  };
  if (problem.type === "/problems/no_face") {
    const aligned = document.querySelector("input[name=faces][value=aligned]");
    return [button("Read it as one aligned face", () => aligned.click())];
  }
  return picture && RETRIABLE.has(problem.status) ? [button("Try again", () => ask())] : [];
}

async function loadModel() {
  try {
    const response = await fetch("v1/model");
    if (!response.ok) throw new Error(`status ${response.status}`);
    info = await response.json();
    part("model").replaceChildren(modelCard(info));
  } catch (error) {
    info = null;
    part("model").replaceChildren(element("p", {}, `The service does not say which model it has: ${error.message}.`));
  }
}

async function startCamera() {
  const turn = ++cameraTurn;
  picture = null;
  clearResult();
  say("Starting the camera …");
  try {
    const opened = await openCamera();
    if (turn !== cameraTurn) return closeCamera(opened);
    stream = opened;
    stream.getVideoTracks()[0].addEventListener("ended", giveUpCamera);
    video.srcObject = stream;
    show("camera");
    say("The camera is on.");
    part("camera-take").focus();
    await video.play();
  } catch (error) {
    if (turn !== cameraTurn) return;
    giveUpCamera();
    showProblem({ title: "No camera", detail: error.detail ?? error.message, hint: error.hint ?? "Choose a file." });
  }
}

function stopCamera() {
  cameraTurn += 1;
  closeCamera(stream);
  stream = null;
  video.srcObject = null;
}

function giveUpCamera() {
  stopCamera();
  show("empty");
  say("No photograph.");
  part("camera-start").focus();
}

async function takePicture() {
  try {
    const still = await takeStill(video);
    part("camera-start").hidden = false;
    part("camera-start").focus();
    await open(still);
  } catch (error) {
    showProblem({ title: "No picture", detail: error.detail ?? error.message, hint: error.hint ?? "Try again." });
  }
}

function openFirst(files, verb) {
  if (files.length === 0) {
    clearResult();
    showProblem({ title: "No file", detail: `What was ${verb} is no file.`, hint: "Save the picture and choose its file." });
    return;
  }
  open(files[0]);
  if (files.length > 1) say(`Reading the first of the ${files.length} files …`);
}

function listen() {
  part("file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    if (file) open(file);
    event.target.value = ""; // So that the same file can be chosen again.
  });
  part("camera-start").addEventListener("click", startCamera);
  part("camera-take").addEventListener("click", takePicture);
  part("camera-stop").addEventListener("click", giveUpCamera);
  for (const radio of document.getElementsByName("faces")) {
    radio.addEventListener("change", () => picture && ask());
  }
  part("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (picture) ask();
    else say("The key goes with the next photograph.");
  });
  window.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) openFirst(event.clipboardData.files, "pasted");
  });
  window.addEventListener("dragover", (event) => {
    event.preventDefault();
    stage.classList.add("over");
  });
  window.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) stage.classList.remove("over");
  });
  window.addEventListener("drop", (event) => {
    event.preventDefault();
    stage.classList.remove("over");
    openFirst(event.dataTransfer.files, "dropped");
  });
  window.addEventListener("pagehide", () => (stream ? giveUpCamera() : stopCamera()));
}

listen();
loadModel();
