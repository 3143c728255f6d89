"""Whether a host answers, found out in seconds: clients of weight hosts try again for minutes."""

import ssl
import threading
import urllib.error
import urllib.request

__all__ = ['SECONDS', 'unreachable']

SECONDS = 3.0


def unreachable(url: str, seconds: float | None = None) -> str | None:
    """Return why a host does not answer, or None if it does, whatever it says.

    Args:
        url: Any address of the host; proxies in the environment are used.
        seconds: How long to wait for it, 3 by default.
    """
    seconds = SECONDS if seconds is None else seconds
    found: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method='HEAD', headers={'User-Agent': 'kw_timm'})
            # Not urlopen, which keeps the proxies of its first call.
            urllib.request.build_opener().open(request, timeout=seconds).close()
        except urllib.error.HTTPError as error:
            error.close()
        except (OSError, ValueError) as error:
            reason = getattr(error, 'reason', error)
            # Of certificates the client has the say, whose own settings name those that it trusts.
            if not isinstance(reason, ssl.SSLError):
                found.append(str(reason) or type(error).__name__)
                return
        found.append(None)

    # A thread, since looking a name up knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds + 0.2)
    return found[0] if found else f'no answer within {seconds:g} s'
