#!/bin/sh
# `make demo`: draw faces, train on Ray Train, evaluate, predict a photograph, tune on Ray Tune, serve on Ray Serve.
# RUN: folder of the environment's programs. DEMO: where results go; what is already there is not made again.
set -eu
say() { printf '\n== %s\n' "$*" >&2; }

say "1/6 drawing faces in RAF-CE's layout into $DEMO/faces"
if [ -d "$DEMO/faces" ]; then
  echo "already there; remove it to draw them again" >&2
else
  "$RUN/rafce" data synthesize --out "$DEMO/faces" --num-images 2400
fi

say "2/6 training a small model on Ray Train"
if [ -d "$DEMO/runs/demo/bundle" ]; then
  echo "already there; remove $DEMO/runs/demo to train it again" >&2
else
  "$RUN/rafce" train --recipe demo data.root="$DEMO/faces" data.store_dir="$DEMO/stores" run.storage="$DEMO/runs" run.name=demo \
    optim.epochs=8
fi

say "3/6 evaluating it on the test split"
"$RUN/rafce" evaluate --bundle "$DEMO/runs/demo/bundle"

say "4/6 predicting a photograph (Grace Hopper, public domain, from matplotlib's sample data)"
photo=$("$RUN/python" -c 'from matplotlib import cbook; print(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))')
"$RUN/rafce" predict --bundle "$DEMO/runs/demo/bundle" "$photo"

say "5/6 tuning: a small study on Ray Tune, its finalists, the winner on the test split"
"$RUN/rafce" tune --config tune_configs/smoke.yaml \
  base.data.root="$DEMO/faces" base.data.store_dir="$DEMO/stores" storage="$DEMO/runs"

say "6/6 serving the winner on Ray Serve, and sending it the photograph"
port=$("$RUN/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
rm -f "$DEMO/serve.url"
"$RUN/rafce" serve --bundle "$DEMO/runs/smoke/best" --port "$port" > "$DEMO/serve.url" &
server=$!
trap 'kill "$server" 2> /dev/null || true' EXIT
while [ ! -s "$DEMO/serve.url" ]; do
  kill -0 "$server" || { echo "the endpoint did not start" >&2; exit 1; }
  sleep 0.5
done
"$RUN/python" -c '
import sys, urllib.request
url, photo = sys.argv[1:]
request = urllib.request.Request(url, open(photo, "rb").read(), {"Content-Type": "image/jpeg"})
print(urllib.request.urlopen(request).read().decode())
' "$(cat "$DEMO/serve.url")/v1/predict" "$photo"
kill "$server"
wait "$server"
trap - EXIT

cat >&2 <<EOF

Made: $DEMO/faces (drawn faces), $DEMO/runs/demo (the run), $DEMO/runs/demo/bundle (the model), $DEMO/runs/demo/report.html (open it in a browser),
$DEMO/runs/smoke (the study) with its own report.html, best.yaml and best/ (bundle).
The model has seen drawn faces only: what it says of a real one shows the path, not the truth. Next, with your own faces:
  $RUN/rafce doctor $DEMO/runs/demo       what could be better, and the command that tries it
  $RUN/rafce data audit PATH              what is in them, and may they be trained on
  $RUN/rafce train data.root=PATH         the reference recipe (resnet50); --recipe demo for a small model
  $RUN/rafce tune --config tune_configs/regularization.yaml base.data.root=PATH    search what regularises it
  $RUN/rafce serve --bundle $DEMO/runs/smoke/best     the endpoint and its page, until Ctrl-C
  $RUN/rafce predict --bundle runs/NAME/bundle PHOTO.jpg
EOF
