"""How this machine reaches its package registries, for commands that otherwise start with an empty environment.

Docker hands a build the engine's proxies and DNS; a machine behind a mirror or with a certificate authority of its own
has such settings in its base images. Here the host's are lent for the time of the run and never become part of what
is built. Folders of packages on the host are not lent: they would make the environment less clean.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")
BUNDLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO")
CERTIFICATES = ("PIP_CERT", "PIP_CLIENT_CERT", *BUNDLES)
PIP = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_PROXY", "PIP_TIMEOUT", "PIP_DEFAULT_TIMEOUT")
PIP_LATER = ("PIP_RETRIES", "PIP_CERT", "PIP_CLIENT_CERT")
APT = re.compile(r'^Acquire::(https?|ftp|Retries|Check-Valid-Until|Check-Date)\b.* ".+";$', re.MULTILINE)


def registry_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables to lend: proxies, certificates, and pip's indexes from its variables and configuration files."""
    lent = {name: value for name, value in environ.items() if name.lower() in PROXIES or name in CERTIFICATES}
    known = pip_files(environ) | {name: environ[name] for name in PIP + PIP_LATER if name in environ}
    for name, value in known.items():
        words = [word for word in value.split() if not word.startswith("file:")]
        if words:
            lent[name] = " ".join(words)
    return {name: value for name, value in lent.items() if name not in CERTIFICATES or os.path.isfile(value)}


def pip_files(environ: Mapping[str, str]) -> dict[str, str]:
    """What pip's configuration files say, as the variables that mean the same; later files win, as for pip."""
    home = Path(environ.get("HOME") or Path.home())
    shared = (environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(os.pathsep)
    files = [Path(folder) / "pip" / "pip.conf" for folder in shared] + [Path("/etc/pip.conf")]
    files += [home / ".pip" / "pip.conf", Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf"]
    files += [Path(sys.prefix) / "pip.conf", Path(environ.get("PIP_CONFIG_FILE") or os.devnull)]
    if environ.get("PIP_CONFIG_FILE") == os.devnull:
        return {}
    parser = configparser.RawConfigParser()
    found: dict[str, str] = {}
    for file in files:
        parser.clear()
        parser.read(file, encoding="utf-8")
        for section in ("global", "install"):
            for key, value in parser.items(section) if parser.has_section(section) else ():
                name = "PIP_" + key.upper().replace("-", "_")
                if name in PIP + PIP_LATER:
                    found[name] = value
    return found


def apt_configuration() -> str:
    """apt's proxies, retries and clock checks, in the syntax of a file that APT_CONFIG names."""
    if not shutil.which("apt-config"):
        return ""
    shown = subprocess.run(["apt-config", "dump"], capture_output=True, text=True).stdout
    return "".join(f"{match[0]}\n" for match in APT.finditer(shown))


def debian_mirror(suite: str) -> str | None:
    """Where this machine's apt gets the main archive of ``suite``, or None."""
    if not shutil.which("apt-get"):
        return None
    form = "$(CREATED_BY) $(CODENAME) $(COMPONENT) $(REPO_URI)"
    listed = subprocess.run(["apt-get", "indextargets", "--format", form], capture_output=True, text=True)
    for line in listed.stdout.splitlines():
        kind, codename, component, place = line.split(" ", 3)
        if (kind, codename, component) == ("Packages", suite, "main"):
            return place
    return None
