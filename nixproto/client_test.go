package nixproto

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
)

// A scripted connection answers with what a real server said, and keeps what
// the client writes.
type scripted struct {
	io.Reader
	bytes.Buffer
}

func (s *scripted) Read(p []byte) (int, error) { return s.Reader.Read(p) }

func recordingOf(t testing.TB, name string) recording {
	t.Helper()
	for _, r := range recordings(t) {
		if r.name == name {
			return r
		}
	}
	t.Fatalf("no recording %s", name)
	return recording{}
}

// TestClient lets a Client repeat what real clients did, against what real
// servers answered.
func TestClient(t *testing.T) {
	for _, name := range []string{"nix2.34-hook-ng-2", "nix2.34-hook-fail-ng-2", "nix2.8-build-store-ng-noeval", "nix2.34-verify-ng",
		"nix2.8-ca-query-ng"} {
		t.Run(name, func(t *testing.T) {
			rec := recordingOf(t, name)
			script := newSide(rec.c2s) // read beside the client: what it has to do
			_, v, err := ServerHandshake(script.Reader, script.w, Hello{Version: Version(rec.s2c[8]) | 1<<8})
			if err != nil {
				t.Fatal(err)
			}
			conn := &scripted{Reader: bytes.NewReader(rec.s2c)}
			logs := 0
			c, err := NewClient(conn, Hello{Version: Version(rec.c2s[8]) | 1<<8}, func(LogMessage) { logs++ })
			if err != nil || c.Version != v || !strings.HasPrefix(c.Server.Nix, "2.") {
				t.Fatalf("%+v, %v", c, err)
			}
			for {
				req, err := ReadRequest(script.Reader, v)
				if err == io.EOF {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				doAgain(t, c, script, req)
			}
			if c.Reader.Await() != io.EOF {
				t.Error("client did not read all that the server said")
			}
			again := newSide(conn.Bytes())
			if _, _, err := ServerHandshake(again.Reader, again.w, Hello{Version: v}); err != nil {
				t.Errorf("what the client wrote: %v", err)
			}
		})
	}
}

// doAgain does req with its stream and reads a NAR that is the answer.
func doAgain(t *testing.T, c *Client, script *side, req Request) {
	t.Helper()
	var body func(*Writer) error
	switch req.(type) {
	case *AddToStore, *AddToStoreNar, *AddMultipleToStore, *AddBuildLog:
		framed := NewFramedReader(script.Reader)
		body = func(w *Writer) error { return copyRaw(&framed.Reader, w) }
	}
	_, err := c.Do(req, body)
	if _, refused := errors.AsType[*LogError](err); err != nil && !refused {
		t.Fatalf("%v: %v", req.Op(), err)
	}
	if err == nil && req.Op() == OpNarFromPath {
		if err := copyNar(c.Reader, NewWriter(io.Discard)); err != nil {
			t.Fatalf("%v: %v", req.Op(), err)
		}
	}
}

// TestClientRefused: a server's error in place of the handshake's end.
func TestClientRefused(t *testing.T) {
	b := encoded(t, func(w *Writer) error {
		writeAll(w, workerServerMagic, uint64(MaxWorker), 0)
		w.Str("nbd")
		w.Uint64(uint64(Trusted))
		return WriteError(w, MaxWorker, errors.New("account is disabled"))
	})
	_, err := NewClient(&scripted{Reader: bytes.NewReader(b)}, Hello{Version: MaxWorker}, nil)
	if e, ok := errors.AsType[*LogError](err); !ok || e.Message != "account is disabled" {
		t.Errorf("refused: %v", err)
	}
	_, err = NewClient(&scripted{Reader: bytes.NewReader(b[:len(b)-8])}, Hello{Version: MaxWorker}, nil)
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("cut off: %v", err)
	}
}

func TestServeClient(t *testing.T) {
	rec := recordingOf(t, "nix2.34-hook-ssh-2")
	script := newSide(rec.c2s)
	v, err := ServeServerHandshake(script.Reader, script.w, MaxServe)
	if err != nil {
		t.Fatal(err)
	}
	conn := &scripted{Reader: bytes.NewReader(rec.s2c)}
	c, err := NewServeClient(conn, MaxServe)
	if err != nil || c.Version != v {
		t.Fatalf("%+v, %v", c, err)
	}
	for {
		req, err := ReadServeRequest(script.Reader, v)
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		var body func(*Writer) error
		if req.Command() == CmdAddToStoreNar {
			body = func(w *Writer) error { return copyNar(script.Reader, w) }
		}
		if _, err := c.Do(req, body); err != nil {
			t.Fatalf("%v: %v", req.Command(), err)
		}
		if req.Command() == CmdDumpStorePath {
			if err := copyNar(c.Reader, NewWriter(io.Discard)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if !bytes.Equal(conn.Bytes(), rec.c2s) {
		t.Error("the client wrote other bytes than Nix's")
	}
}
