# The server as a service: part of the Makefile. deploy/service.sh does the work, docs/deploy.md explains the use.
#
#   SERVICE_COMMAND=$PWD/.venv/bin/turbocache   run this command instead of the service's own copy
#   DESTDIR=...   install the system's files below another root and start nothing

USER_PREFIX := $(HOME)/.local/share/turbocache
SYSTEM_PREFIX := /opt/turbocache

# Settings of the command line are refused, because the service outlives it.
GIVEN := $(strip $(foreach name,HOST PORT,$(if $(filter command,$(origin $(name))),$(name)=$($(name)))))

# $(1): the prefix. A copy, so that neither `make clean` nor an edit in the checkout affects the service. It has bytecode, because the
# service may not write it.
OWN_ENV = rm -f '$(1)'/venv/.installed-* && UV_COMPILE_BYTECODE=1 $(MAKE) --no-print-directory env VENV='$(1)/venv' \
	PROJECT='--reinstall-package turbocache .' && { '$(1)/venv/bin/turbocache' starter --if-needed --uv $(UV) || true; }
# $(1): the action, $(2): the prefix.
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
	@# The service can't see home directories, and the environment needs the Python that created it.
	@case "$$('$(PYTHON)' -c 'import os, sys; print(os.path.realpath(sys.executable))')" in /home/*|/root/*) \
	  echo "$(PYTHON) lies in a home directory, which the service can't see: name another with PYTHON=..." >&2; exit 1;; esac
	@$(call OWN_ENV,$(DESTDIR)$(SYSTEM_PREFIX))

# On Linux a container reaches a server on 127.0.0.1 only in the host's network.
monitoring:
	docker compose -f deploy/compose.yaml $(if $(filter Linux,$(OS)),-f deploy/compose.linux.yaml) up --detach --wait
	@echo "Grafana: http://127.0.0.1:3000   Prometheus: http://127.0.0.1:9090"
