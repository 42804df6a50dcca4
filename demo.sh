#!/bin/sh
# `make demo`: draw faces, train on Ray Train from ImageNet weights, evaluate, serve on Ray Serve, show one face.
# `make demo-real`: the same with photographs of real people (FACES=real), aligned first.
# RUN: folder of the environment's programs. DEMO: where results go; what is already there is not made again.
# PHOTOGRAPHS: the London photographs, if they are on this disk; else they are downloaded.
set -eu
say() { printf '\n== %s\n' "$*" >&2; }
rafce="$RUN/rafce"
if [ "${FACES:-drawn}" = real ]; then
  faces=$DEMO/london name=real recipe=few
  say "1/5 aligning the faces of 86 or more people, neutral and smiling, into $faces"
  if [ -d "$PHOTOGRAPHS" ]; then
    "$rafce" data align "$PHOTOGRAPHS" --out "$faces"
  else
    "$rafce" data fetch london --out "$faces"
  fi
else
  faces=$DEMO/faces name=demo recipe=demo
  say "1/5 drawing faces in RAF-CE's layout into $faces"
  if [ -d "$faces" ]; then
    echo "already there; remove it to draw them again" >&2
  else
    "$rafce" data synthesize --out "$faces" --num-images 2400
  fi
fi
bundle=$DEMO/runs/$name/bundle

say "2/5 training on Ray Train, from what a network learnt from ImageNet's photographs"
if [ -d "$bundle" ]; then
  echo "already there; remove $DEMO/runs/$name to train it again" >&2
else
  "$rafce" train --recipe "$recipe" data.root="$faces" data.store_dir="$DEMO/stores" run.storage="$DEMO/runs" run.name="$name" \
    model.weights=package
fi

say "3/5 evaluating it on the test split"
"$rafce" evaluate --bundle "$bundle"

say "4/5 serving it on Ray Serve, and sending it a face of the test split"
face=$("$RUN/python" - "$faces" <<'EOF'
import csv, pathlib, sys
faces = pathlib.Path(sys.argv[1])
if (faces / "labels.csv").exists():
    rows = csv.DictReader((faces / "labels.csv").open())
    print(next(faces / "aligned" / row["name"] for row in rows if row["split"] == "test"))
else:
    lines = (line.split() for line in (faces / "RAFCE_partition.txt").read_text().splitlines())
    name = next(name for name, split in lines if split == "1")
    print(faces / "aligned" / f"{pathlib.Path(name).stem}_aligned.jpg")
EOF
)
port=$("$RUN/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
rm -f "$DEMO/serve.url"
"$rafce" serve --bundle "$bundle" --port "$port" > "$DEMO/serve.url" &
server=$!
trap 'kill "$server" 2> /dev/null || true' EXIT
while [ ! -s "$DEMO/serve.url" ]; do
  kill -0 "$server" || { echo "the endpoint did not start" >&2; exit 1; }
  sleep 0.5
done
"$RUN/python" -c '
import sys, urllib.request
url, face = sys.argv[1:]
request = urllib.request.Request(url, open(face, "rb").read(), {"Content-Type": "image/jpeg"})
print(urllib.request.urlopen(request).read().decode())
' "$(cat "$DEMO/serve.url")/v1/predict?faces=aligned" "$face"
kill "$server"
wait "$server"
trap - EXIT

say "5/5 one face of the test split, as the model reads it"
cat >&2 <<EOF
Made: $DEMO/runs/$name (the run), $bundle (the model), $DEMO/runs/$name/report.html (open it in a browser).
Next, with your own faces:
  $rafce data align PHOTOGRAPHS --out faces     cut the faces out of labelled photographs
  $rafce data audit faces                       what is in them, and may they be trained on
  $rafce train --recipe few data.root=faces data.stored_px=224     for 50 to 1,000 faces; without --recipe for more
  $rafce doctor $DEMO/runs/$name                what could be better, and the command that tries it
  $rafce tune --config tune_configs/regularization.yaml base.data.root=faces    search what regularises it
  $rafce serve --bundle $bundle     the endpoint and its page, until Ctrl-C

EOF
if [ "$name" = demo ]; then
  cat >&2 <<'EOF'
Drawn faces teach how the parts work together, and nothing about people: this model may not be used on photographs.
`make demo-real` trains on photographs of real people.
EOF
else
  cat >&2 <<'EOF'
This model tells a posed smile from a calm face in the photographs of one studio. It knows no other expression.
EOF
fi
"$rafce" predict --bundle "$bundle" --faces aligned --show "$face"
