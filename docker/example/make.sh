#!/bin/sh
# Makes example/made with the server's image: sh docker/example/make.sh [FOLDER]. The files belong to uid 10001, as which all images run.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
made=${1:-$here/made}
mkdir -p "$made"
exec docker run --rm --network none --user 0:0 --cap-drop ALL --cap-add CHOWN --cap-add DAC_OVERRIDE \
  -v "$here/make.py:/make.py:ro" -v "$made:/made" --entrypoint python "${FEDLAB_IMAGE:-fedlab}-server" /make.py /made
