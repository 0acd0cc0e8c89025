#!/usr/bin/env bash
# Builds a stack's engines on this machine's GPU, serves them on 127.0.0.1, and shows what is served.
#
#   docker/up.sh my-stack.toml
#
# Again with another stack file: its engines replace these. Stop: docker compose -f docker/compose.yaml down
set -euo pipefail

fail() {
  printf 'error: %s\n  next: %s\n' "$1" "$2" >&2
  exit 1
}

[ $# -eq 1 ] || fail "one stack file is needed" "docker/up.sh my-stack.toml"
[ -f "$1" ] || fail "$1: no such file" "name a stack file"
grep -Eq "[\"']tensorrt[\"']" "$1" \
  || fail "$1: its targets do not name \"tensorrt\", which Triton's backend runs" 'add to it: targets = ["tensorrt"]'
if grep -Eq "^[[:space:]]*target[[:space:]]*=[[:space:]]*[\"']tensorrt-llm[\"']" "$1"; then
  fail "$1: an LLM with target = \"tensorrt-llm\" needs another image than the one that is built here" \
    "leave that line out, or: triton-repo write and triton-repo container"
fi
command -v docker >/dev/null || fail "docker is not installed" "install Docker Engine"
docker compose version >/dev/null 2>&1 \
  || fail "docker has no compose command" "install the package docker-compose-plugin"
nvidia-smi -L >/dev/null 2>&1 \
  || fail "no NVIDIA GPU answers on this machine" "install the driver, or run this where the card is"

ONECARD_STACK_DIR="$(cd "$(dirname "$1")" && pwd)"
ONECARD_STACK_FILE="$(basename "$1")"
export ONECARD_STACK_DIR ONECARD_STACK_FILE
compose() { docker compose -f "$(dirname "$0")/compose.yaml" "$@"; }

compose --profile build --profile client build
compose run --rm build
# A server that runs already has the old repository open.
compose up --detach --force-recreate serve
server="$(compose ps --all --quiet serve)"
while :; do
  state="$(docker inspect --format '{{.RestartCount}} {{.State.Health.Status}}' "$server" || true)"
  case "$state" in
    "0 healthy") break ;;
    "0 starting") sleep 2 ;;
    # Docker starts a server that ended again, for ever; what stopped it once would do so every time.
    *)
      compose logs --tail 40 serve >&2
      compose stop serve
      fail "the server did not become ready" "read its log above"
      ;;
  esac
done
compose run --rm client status
