#!/bin/sh
# As the official image does: /data belongs to redis, and the server does not run as root.
set -eu
if [ "${1:-}" = prepare-image ]; then
    install -d -o redis -g redis /data
    exit
fi
cd /data
case "${1:-}" in "" | -*) set -- redis-server "$@" ;; esac
if [ "$1" = redis-server ] && [ "$(id -u)" = 0 ]; then
    chown -R redis:redis /data
    exec setpriv --reuid redis --regid redis --clear-groups -- "$@"
fi
exec "$@"
