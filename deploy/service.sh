#!/bin/sh
# Installs, starts and uninstalls the server as a service. Called by deploy/service.mk.
#
# The user's service is below HOME and needs no root, on Linux (systemd) and macOS (launchd). The system's service is for Linux
# machines that serve others.
#
# From make: COMMAND (the command to start), PREFIX (the folder of the copy), ACCEL, DESTDIR, and GIVEN (settings of the command line).
set -eu
cd "$(dirname "$0")"

label=io.github.turbocache
state=$HOME/.local/state/turbocache
cache=$HOME/.cache/turbocache
config=${XDG_CONFIG_HOME:-$HOME/.config}
units=$config/systemd/user
settings=$config/turbocache/environment
agent=$HOME/Library/LaunchAgents/$label.plist
log=$HOME/Library/Logs/turbocache.log
system_units=$DESTDIR/etc/systemd/system
system_settings=$DESTDIR/etc/turbocache/environment

fail() {
    echo "$1" >&2
    exit 1
}

# These characters have a meaning for systemd, launchd, make or sed. ($1: the settings file)
check() {
    for path in "$COMMAND" "$PREFIX" "$state" "$config" "$DESTDIR"; do
        case $path in *[[:space:]\&\|\<\>\"\'\\%\$]*) fail "A service can't be installed for this path: $path" ;; esac
    done
    [ -z "$GIVEN" ] || fail "Put $GIVEN into $1 instead: the service reads that file at each start."
}

fill_in() { # template, file
    sed -e "s|@COMMAND@|$COMMAND|g" -e "s|@SETTINGS@|$settings|g" -e "s|@STATE@|$state|g" -e "s|@CACHE@|$cache|g" \
        -e "s|@LOG@|$log|g" "$1" >"$2"
    chmod 644 "$2" # launchd refuses files that others can write
}

# An existing file stays as it is.
keep_settings() { # file
    [ -e "$1" ] && return
    mkdir -p "$(dirname "$1")"
    install -m 600 environment.example "$1"
}

drop_in() { # yes or no, template, folder of units
    target=$3/turbocache.service.d/$(basename "$2")
    if [ "$1" = yes ]; then
        mkdir -p "$3/turbocache.service.d"
        fill_in "$2" "$target"
    else
        rm -f "$target"
    fi
}

is_cuda() { if [ "$ACCEL" = cuda ]; then echo yes; else echo no; fi; }

remove_unit() { # folder of units; other drop-ins stay
    rm -f "$1/turbocache.service" "$1/turbocache.service.d/10-sandbox.conf" "$1/turbocache.service.d/20-nvidia.conf"
    rmdir "$1/turbocache.service.d" 2>/dev/null || true
}

user_folders() {
    install -d -m 700 "$state" "$cache"
    mkdir -p "$HOME/.cache/huggingface"
    keep_settings "$settings"
}

say_where() { # how to see the log
    echo "Started. It answers at http://127.0.0.1:8000/health, or where the settings say, once the model is loaded."
    echo "  settings   $settings, then: make restart-service"
    echo "  log        $1"
}

# --- Linux, the user's service ---

install_Linux() {
    user_folders
    mkdir -p "$units"
    systemctl --user daemon-reload ||
        fail "systemd does not answer as your user's: log in as that user, not by su or sudo, and try again."
    sandbox=yes
    systemd-run --user --wait --quiet --property=PrivateUsers=yes --property=ProtectSystem=strict true 2>/dev/null || {
        sandbox=no
        echo "The kernel gives your user no namespace (Ubuntu: kernel.apparmor_restrict_unprivileged_userns): the service" \
            "will see and may write all that you may."
    }
    fill_in systemd/user/turbocache.service "$units/turbocache.service"
    drop_in $sandbox systemd/user/10-sandbox.conf "$units"
    drop_in "$(is_cuda)" systemd/20-nvidia.conf "$units"
    systemctl --user daemon-reload
    systemctl --user enable turbocache.service
    restart_Linux
    say_where "journalctl --user -u turbocache -f"
    echo "It ends when you log out; to have it from boot on: loginctl enable-linger"
}

# After several failed starts systemd refuses another one for minutes.
restart_Linux() {
    systemctl --user reset-failed turbocache.service 2>/dev/null || true
    systemctl --user restart turbocache.service
}

uninstall_Linux() {
    # A service that does not exist can't be stopped. That is no error.
    systemctl --user disable --now turbocache.service || true
    remove_unit "$units"
    systemctl --user daemon-reload
}

# --- macOS, the user's service ---

install_Darwin() {
    user_folders
    mkdir -p "$(dirname "$agent")" "$(dirname "$log")"
    fill_in "launchd/$label.plist" "$agent"
    restart_Darwin
    say_where "tail -f $log"
}

restart_Darwin() {
    stop_Darwin
    launchctl enable "gui/$(id -u)/$label"
    launchctl bootstrap "gui/$(id -u)" "$agent"
}

# bootout may return while the server still writes its sessions. bootstrap is refused until the server has ended.
stop_Darwin() {
    launchctl bootout "gui/$(id -u)/$label" 2>/dev/null || true
    seconds=0
    while launchctl print "gui/$(id -u)/$label" >/dev/null 2>&1; do
        [ $seconds -lt 130 ] || fail "The service does not end; see $log"
        sleep 1
        seconds=$((seconds + 1))
    done
}

uninstall_Darwin() {
    stop_Darwin
    rm -f "$agent"
}

# --- Linux, the system's service ---

systemctl_here() {
    if [ -z "$DESTDIR" ]; then systemctl "$@"; fi
}

install_system() {
    mkdir -p "$system_units"
    keep_settings "$system_settings"
    fill_in systemd/turbocache.service "$system_units/turbocache.service"
    drop_in "$(is_cuda)" systemd/20-nvidia.conf "$system_units"
    systemctl_here daemon-reload
    systemctl_here enable turbocache.service
    systemctl_here reset-failed turbocache.service 2>/dev/null || true
    systemctl_here restart turbocache.service
    echo "  settings   $system_settings, then: systemctl restart turbocache"
    echo "  log        journalctl -u turbocache -f"
}

uninstall_system() {
    systemctl_here disable --now turbocache.service || true
    remove_unit "$system_units"
    systemctl_here daemon-reload
    rm -rf "$DESTDIR$PREFIX/venv"
    rmdir "$DESTDIR$PREFIX" 2>/dev/null || true
    echo "Left in place: $system_settings, sessions in /var/lib/turbocache, models in /var/cache/turbocache"
}

system=$(uname -s)
case $system in Linux | Darwin) ;; *) fail "No way to install a service on $system is known: see docs/deploy.md" ;; esac
case $1 in
check) check "$settings" ;;
install)
    check "$settings"
    "install_$system"
    ;;
restart) "restart_$system" ;;
uninstall)
    "uninstall_$system"
    rm -rf "$PREFIX/venv" "$cache"
    rmdir "$PREFIX" 2>/dev/null || true
    echo "Left in place: $settings, sessions in $state, models in $HOME/.cache/huggingface"
    ;;
install-system)
    check "$system_settings"
    install_system
    ;;
uninstall-system) uninstall_system ;;
*) fail "unknown: $1" ;;
esac
