/** The camera: its pictures go into a video element, and a still of it into a JPEG. Nothing is recorded. */

const REASONS = {
  NotAllowedError: ["The camera was not allowed.", "Allow it for this page in the browser's settings, or choose a file."],
  NotFoundError: ["There is no camera.", "Connect one, or choose a file."],
  NotReadableError: ["The camera cannot be read.", "Close other programs that use it, or choose a file."],
};

/** The stream of the camera that faces the user; an error with `detail` and `hint` where there is none. */
export async function openCamera() {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw refusal("The browser gives this page no camera.", "Open the page by https or by http://localhost.");
  }
  try {
    return await navigator.mediaDevices.getUserMedia({
      video: { facingMode: "user", width: { ideal: 1280 }, height: { ideal: 960 } },
      audio: false,
    });
  } catch (error) {
    throw refusal(...(REASONS[error.name] ?? [`The camera did not start: ${error.message}`, "Choose a file."]));
  }
}

/** End every track of a stream: the camera's light goes out. */
export function closeCamera(stream) {
  for (const track of stream?.getTracks() ?? []) track.stop();
}

/** What the video shows now, as a JPEG of the camera's own size. */
export async function takeStill(video) {
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  const still = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.95));
  if (still === null) throw refusal("The camera has given no picture yet.", "Wait until you see it, and try again.");
  return still;
}

function refusal(detail, hint) {
  return Object.assign(new Error(detail), { detail, hint });
}
