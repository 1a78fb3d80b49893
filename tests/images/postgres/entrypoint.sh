#!/bin/sh
# As the official image does: POSTGRES_USER, POSTGRES_PASSWORD_FILE and POSTGRES_DB make the first start's cluster.
set -eu
PGDATA=${PGDATA:-/var/lib/postgresql/data}
PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
export PGDATA PATH
if [ "${1:-}" = prepare-image ]; then
    install -d -o postgres -g postgres -m 700 "$PGDATA"
    install -d -o postgres -g postgres -m 3777 /var/run/postgresql
    ln -s /usr/lib/postgresql/*/bin/* /usr/local/bin/
    exit
fi
if [ "$(id -u)" = 0 ]; then
    mkdir -p "$PGDATA"
    chown -R postgres:postgres "$PGDATA" /var/run/postgresql
    exec setpriv --reuid postgres --regid postgres --clear-groups -- "$0" "$@"
fi
case "${1:-}" in "" | -*) set -- postgres "$@" ;; esac
if [ "$1" = postgres ] && [ ! -s "$PGDATA/PG_VERSION" ]; then
    user=${POSTGRES_USER:-postgres}
    initdb --username="$user" --pwfile="${POSTGRES_PASSWORD_FILE:?POSTGRES_PASSWORD_FILE is not set}" \
        --auth-local=trust --auth-host=scram-sha-256 --encoding=UTF8 --locale=C.UTF-8
    echo 'host all all all scram-sha-256' >>"$PGDATA/pg_hba.conf"
    pg_ctl --wait --options="-c listen_addresses=''" start
    [ "${POSTGRES_DB:-$user}" = postgres ] || createdb --username="$user" "${POSTGRES_DB:-$user}"
    pg_ctl --wait stop
fi
if [ "$1" = postgres ]; then
    shift
    set -- postgres -c 'listen_addresses=*' "$@"
fi
exec "$@"
