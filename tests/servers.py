"A local HTTP server that misbehaves as it is told."
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

payload = bytes(range(256)) * 2000
silence = 60 # Seconds for which `silent` and `stalls` say nothing


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args): pass

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get('Range')))
        getattr(self, self.path.strip('/').split('.')[0])()

    def send(self, body, status=200, length=None, **headers):
        self.send_response(status)
        self.send_header('Content-Length', str(len(body) if length is None else length))
        for k, v in headers.items(): self.send_header(k.replace('_', '-'), v)
        self.end_headers()
        try: self.wfile.write(body)
        except OSError: pass
        self.close_connection = True

    def good(self):
        start = int((self.headers.get('Range') or 'bytes=0-')[6:-1])
        if start >= len(payload): self.send(b'', 416)
        elif start: self.send(payload[start:], 206, Content_Range=f'bytes {start}-{len(payload) - 1}/{len(payload)}')
        else: self.send(payload)

    def noranges(self): self.send(payload)
    def wrong(self): self.send(payload[::-1])
    def missing(self): self.send(b'no', 404)
    def broken(self): self.send(b'no', 500)
    def truncated(self): self.send(payload[:100_000], length=len(payload))
    def short(self): self.send(payload, length=1000)
    def nolength(self): self.send(payload, length='abc')
    def redirect(self): self.send(b'', 302, Location='/good.bin')
    def loop(self): self.send(b'', 302, Location='/loop.bin')
    def evil(self): self.send(b'', 302, Location='file:///etc/hostname')

    def silent(self): time.sleep(silence)

    def stalls(self):
        self.send_response(200)
        self.send_header('Content-Length', str(len(payload)))
        self.end_headers()
        self.wfile.write(payload[:1000])
        self.wfile.flush()
        time.sleep(silence)

    def trickle(self):
        "Slow, and able to resume"
        start = int((self.headers.get('Range') or 'bytes=0-')[6:-1])
        self.send_response(206 if start else 200)
        if start: self.send_header('Content-Range', f'bytes {start}-{len(payload) - 1}/{len(payload)}')
        self.send_header('Content-Length', str(len(payload) - start))
        self.end_headers()
        try:
            for i in range(start, len(payload), 20_000):
                self.wfile.write(payload[i:i + 20_000])
                self.wfile.flush()
                time.sleep(.02)
        except OSError: pass
        self.close_connection = True


@contextmanager
def serving():
    "The address of a running server and the list of what it was asked"
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads, server.asked = True, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}', server.asked
    finally: server.shutdown(); server.server_close()
