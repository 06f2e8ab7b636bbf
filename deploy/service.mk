# The server as a service: part of the Makefile; what is done is in deploy/service.sh, how to use it in docs/deploy.md.
#
#   SERVICE_COMMAND=$PWD/.venv/bin/turbocache   serve from there instead of from a copy of the server of its own
#   DESTDIR=...   put the system's files below another root, and start nothing

USER_PREFIX := $(HOME)/.local/share/turbocache
SYSTEM_PREFIX := /opt/turbocache

# A service outlives the command line that installs it.
GIVEN := $(strip $(foreach name,HOST PORT,$(if $(filter command,$(origin $(name))),$(name)=$($(name)))))

# $(1): the prefix. A copy, so that neither `make clean` nor an edited checkout reaches what runs; with its bytecode, which the
# service itself may not write.
OWN_ENV = rm -f '$(1)'/venv/.installed-* && UV_COMPILE_BYTECODE=1 $(MAKE) --no-print-directory env VENV='$(1)/venv' \
	PROJECT='--reinstall-package turbocache .'
# $(1): what to do, $(2): the prefix.
SERVICE = ACCEL='$(ACCEL)' DESTDIR='$(DESTDIR)' GIVEN='$(GIVEN)' PREFIX='$(2)' \
	COMMAND='$(or $(SERVICE_COMMAND),$(2)/venv/bin/turbocache)' sh deploy/service.sh $(1)

.PHONY: install-service restart-service uninstall-service install-system-service uninstall-system-service
.PHONY: service-env system-service-env monitoring

install-service: $(if $(SERVICE_COMMAND),,service-env)
	@$(call SERVICE,install,$(USER_PREFIX))

restart-service uninstall-service:
	@$(call SERVICE,$(@:-service=),$(USER_PREFIX))

install-system-service: $(if $(SERVICE_COMMAND),,system-service-env)
	@$(call SERVICE,install-system,$(SYSTEM_PREFIX))

uninstall-system-service:
	@$(call SERVICE,uninstall-system,$(SYSTEM_PREFIX))

service-env:
	@$(call SERVICE,check,$(USER_PREFIX))
	@$(call OWN_ENV,$(USER_PREFIX))

system-service-env:
	@$(call SERVICE,check,$(SYSTEM_PREFIX))
	@# The service sees no home directory, and an environment borrows the Python that it is made of.
	@case "$$('$(PYTHON)' -c 'import os, sys; print(os.path.realpath(sys.executable))')" in /home/*|/root/*) \
	  echo "$(PYTHON) lies in a home directory, which the service can't see: name another with PYTHON=..." >&2; exit 1;; esac
	@$(call OWN_ENV,$(DESTDIR)$(SYSTEM_PREFIX))

# On Linux a container reaches what listens on 127.0.0.1 only in the host's own network.
monitoring:
	docker compose -f deploy/compose.yaml $(if $(filter Linux,$(OS)),-f deploy/compose.linux.yaml) up --detach --wait
	@echo "Grafana: http://127.0.0.1:3000   Prometheus: http://127.0.0.1:9090"
