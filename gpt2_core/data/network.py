"""Whether there is a network at all, which is known at once where a download's retries take half a minute."""

import socket
import time
import urllib.parse
import urllib.request

_CONNECT_SECONDS = 4  # less than the first timeout of a resolver (5 s): what fails sooner isn't slow


def network_error(url: str) -> OSError | None:
    """Why no connection to the host of `url`, or to the proxy that is set for it, can be made.

    None if one can, and also if that isn't known within seconds: a slow network is left to whoever downloads.
    """
    parts = urllib.parse.urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(parts.hostname):
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = parts.port or {"https": 443, "http": 80}.get(parts.scheme, 1080)
    begin = time.monotonic()
    try:
        socket.create_connection((parts.hostname, port), _CONNECT_SECONDS, all_errors=True).close()
    except ExceptionGroup as group:  # one error for each of the host's addresses
        errors = group.exceptions
    except OSError as error:  # its name can't be resolved
        errors = (error,)
    else:
        return None
    slow = time.monotonic() - begin > _CONNECT_SECONDS or any(isinstance(error, TimeoutError) for error in errors)
    return None if slow else errors[0]
