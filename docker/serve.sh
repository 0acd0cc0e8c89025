#!/bin/sh
# Starts Triton with the APIs closed that change it or write where their caller says: by a key that is told to nobody.
# Who may list this host's processes can read it.
#
#   serve.sh --model-repository=/engines/repository
set -eu

apis=model-repository,shared-memory,trace,logging
key="$(python3 -c 'import secrets; print(secrets.token_urlsafe(32))')"
exec tritonserver "$@" \
  "--http-restricted-api=$apis:triton-grpc-protocol-onecard-admin-key=$key" \
  "--grpc-restricted-protocol=$apis:onecard-admin-key=$key"
