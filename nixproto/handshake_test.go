package nixproto

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// numbers returns integers as they stand on the wire.
func numbers(list ...uint64) []byte {
	var b []byte
	for _, n := range list {
		b = binary.LittleEndian.AppendUint64(b, n)
	}
	return b
}

// pipe returns a connection without any buffer, on which nothing can hang.
func pipe(t *testing.T) (client, server net.Conn) {
	t.Helper()
	client, server = net.Pipe()
	for _, c := range []net.Conn{client, server} {
		if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
	}
	return client, server
}

var testServer = Hello{Version: MaxWorker, Nix: "nbd", Trust: NotTrusted}

// TestHandshakeVersions: every pair of versions agrees on the lower one, and
// both sides stay in step.
func TestHandshakeVersions(t *testing.T) {
	for _, sv := range workerVersions {
		for _, cv := range append(workerVersions, 0x127, 0x1ff) {
			server := Hello{Version: sv, Nix: "nbd", Trust: Trusted}
			v := min(sv, cv)
			if v >= 0x126 {
				server.Features = []string{"f", "g"}
			}
			client, srv := pipe(t)
			done := make(chan error, 1)
			go func() {
				r, w := NewReader(srv), NewWriter(srv)
				theirs, got, err := ServerHandshake(r, w, server)
				if err == nil && (got != v || theirs.Version != cv) {
					err = errors.New("server: wrong version")
				}
				done <- errors.Join(err, WriteLog(w, v, &LogLast{}), w.Flush())
			}()
			// A pipe has no room at all: each side flushes before it waits.
			c, err := NewClient(client, Hello{Version: cv}, nil)
			if err := errors.Join(err, <-done); err != nil {
				t.Fatalf("%v with %v: %v", cv, sv, err)
			}
			want := server
			if v < 0x121 {
				want.Nix = ""
			}
			if v < 0x123 {
				want.Trust = TrustUnknown
			}
			if d := cmp.Diff(want, c.Server); d != "" || c.Version != v {
				t.Errorf("%v with %v speaks %v\n%s", cv, sv, c.Version, d)
			}
		}
	}
}

// TestHandshakeWaits: Nix 2.8 sends its version only after the server's.
func TestHandshakeWaits(t *testing.T) {
	for name, test := range map[string]struct {
		magic, answer uint64
		handshake     func(*Reader, *Writer) error
	}{
		"worker": {workerClientMagic, workerServerMagic, func(r *Reader, w *Writer) error {
			_, _, err := ServerHandshake(r, w, testServer)
			return err
		}},
		"serve": {serveClientMagic, serveServerMagic, func(r *Reader, w *Writer) error {
			_, err := ServeServerHandshake(r, w, MaxServe)
			return err
		}},
	} {
		client, server := pipe(t)
		done := make(chan error, 1)
		go func() {
			done <- test.handshake(NewReader(server), NewWriter(server))
		}()
		if _, err := client.Write(numbers(test.magic)); err != nil {
			t.Fatal(err)
		}
		var hello [16]byte
		if _, err := io.ReadFull(client, hello[:]); err != nil || binary.LittleEndian.Uint64(hello[:]) != test.answer {
			t.Errorf("%s: hello %x, %v", name, hello, err)
		}
		if err := client.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-done; !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s: client gone: %v", name, err)
		}
	}
}

// TestHandshakeOld: clients that are too old are read to the end of their hello
// and can be told.
func TestHandshakeOld(t *testing.T) {
	tests := map[string][]byte{
		"1.21, Nix 2.3": numbers(workerClientMagic, 0x115, 0, 0),
		"1.31":          numbers(workerClientMagic, 0x11f, 1, 3, 0),
		"1.13":          numbers(workerClientMagic, 0x10d, 0),
		"1.10":          numbers(workerClientMagic, 0x10a),
	}
	for name, hello := range tests {
		r := NewReader(bytes.NewReader(hello))
		var out bytes.Buffer
		_, v, err := ServerHandshake(r, NewWriter(&out), testServer)
		old, ok := errors.AsType[*VersionError](err)
		if !ok || old.Version != v || !strings.Contains(err.Error(), "Nix 2.4") {
			t.Errorf("%s: %v, version %v", name, err, v)
		}
		if r.Await() != io.EOF {
			t.Errorf("%s: hello not read to its end", name)
		}
		if !bytes.Equal(out.Bytes(), numbers(workerServerMagic, uint64(MaxWorker))) {
			t.Errorf("%s: answered %q", name, out.Bytes())
		}
	}
	out := NewWriter(io.Discard)
	_, err := ServeServerHandshake(NewReader(bytes.NewReader(numbers(serveClientMagic, 0x204))), out, MaxServe)
	if _, ok := errors.AsType[*VersionError](err); !ok || !strings.Contains(err.Error(), "2.4 of the Nix serve") {
		t.Errorf("serve 2.4: %v", err)
	}
	_, _, err = ClientHandshake(NewReader(bytes.NewReader(numbers(workerServerMagic, 0x115))), out, Hello{Version: MaxWorker})
	if _, ok := errors.AsType[*VersionError](err); !ok {
		t.Errorf("old server: %v", err)
	}
}

func TestHandshakeForeign(t *testing.T) {
	out := NewWriter(io.Discard)
	for name, test := range map[string]struct {
		hello []byte
		want  error
	}{
		"nothing":      {nil, io.EOF},
		"text":         {[]byte("GET / HTTP/1.1\r\n"), ErrMagic},
		"cut":          {numbers(workerClientMagic)[:4], io.ErrUnexpectedEOF},
		"other":        {numbers(serveServerMagic, 0x207), ErrMagic},
		"huge version": {append(numbers(workerClientMagic, 1<<40), numbers(serveClientMagic, 1<<40)...), ErrMalformed},
	} {
		_, _, err := ServerHandshake(NewReader(bytes.NewReader(test.hello)), out, testServer)
		if !errors.Is(err, test.want) {
			t.Errorf("worker, %s: %v", name, err)
		}
		if name == "huge version" {
			test.hello = test.hello[16:]
		}
		if _, err := ServeServerHandshake(NewReader(bytes.NewReader(test.hello)), out, MaxServe); !errors.Is(err, test.want) {
			t.Errorf("serve, %s: %v", name, err)
		}
	}
}
