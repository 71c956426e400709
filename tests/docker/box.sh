#!/bin/bash
# A Docker engine in mount and network namespaces of its own: box.sh FOLDER, under `unshare --mount --net --propagation private`.
# Bridges and address translation stay in there, and nothing in there reaches a network: what is built is built offline.
# It writes "up" once it answers, and ends when its standard input does.
set -u
folder=$1
mkdir -p /run/netns && mount -t tmpfs tmpfs /run/netns
ip link set lo up
rm -f "$folder/docker.pid"
dockerd --data-root "$folder/data" --exec-root "$folder/exec" --pidfile "$folder/docker.pid" -H "unix://$folder/docker.sock" \
  --storage-driver overlay2 --oom-score-adjust 0 --exec-opt native.cgroupdriver=cgroupfs >"$folder/dockerd.log" 2>&1 </dev/null &
pid=$!
for _ in $(seq 120); do
  if ! kill -0 $pid 2>/dev/null; then tail -n 5 "$folder/dockerd.log" >&2; exit 1; fi
  if /usr/bin/docker -H "unix://$folder/docker.sock" version >/dev/null 2>&1; then echo up; break; fi
  sleep 0.5
done
cat >/dev/null
left=$(/usr/bin/docker -H "unix://$folder/docker.sock" ps -aq) # of a test that was cut off: they would outlive the engine
[ -n "$left" ] && /usr/bin/docker -H "unix://$folder/docker.sock" rm -f -v $left >/dev/null
kill $pid
wait $pid
