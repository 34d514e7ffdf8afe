package server

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	gossh "golang.org/x/crypto/ssh"

	"nbd/nixproto"
	"nbd/store"
)

// A memoryChannel is a session channel whose client sends what is in it and
// then leaves; nobody reads the answers.
type memoryChannel struct{ io.Reader }

func (memoryChannel) Write(p []byte) (int, error)                    { return len(p), nil }
func (memoryChannel) Close() error                                   { return nil }
func (memoryChannel) CloseWrite() error                              { return nil }
func (memoryChannel) SendRequest(string, bool, []byte) (bool, error) { return true, nil }
func (c memoryChannel) Stderr() io.ReadWriter                        { return c }

var _ gossh.Channel = memoryChannel{}

// FuzzSession sends anything to a session of either protocol: it ends, without
// a panic, and no fault of the server's own is told.
func FuzzSession(f *testing.F) {
	names, err := filepath.Glob("../testdata/wire/nix2.34-*.c2s")
	if err != nil || len(names) < 30 {
		f.Fatalf("recordings: %d found, %v", len(names), err)
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, b[0] == 'c') // the first byte of the worker protocol's magic
	}
	s, account := quietServer(f)
	f.Fuzz(func(t *testing.T, in []byte, worker bool) {
		var log bytes.Buffer
		sight := s.store.NewSight(account.ID, store.Trust{})
		ss := &session{
			Session: &Session{
				ID: "fuzz", Client: &Client{Account: account, Permissions: store.Permissions()},
				Sight:  sight,
				Log:    slog.New(slog.NewTextHandler(&log, nil)),
				leases: sight.NewLease(),
			},
			server: s, conn: &conn{}, ch: memoryChannel{bytes.NewReader(in)}, ctx: t.Context(),
		}
		defer ss.leases.Release()
		if worker {
			serveWorker(ss)
		} else {
			serveServe(ss, true)
		}
		if bytes.Contains(log.Bytes(), []byte("level=ERROR")) {
			t.Error(log.String())
		}
	})
}

// quietServer is a server that does not listen.
func quietServer(f *testing.F) (*Server, store.Account) {
	f.Helper()
	st, err := store.Open(f.TempDir(), store.Config{MinFree: -1})
	if err != nil {
		f.Fatal(err)
	}
	a, err := st.AddAccount(f.Context(), "alice")
	if err != nil {
		f.Fatal(err)
	}
	b := &fakeBuilder{store: st}
	b.build = func(ctx context.Context, _ *Session, _ *BuildRequest, _ LogSink) (*nixproto.BuildResult, error) {
		return &nixproto.BuildResult{}, ctx.Err()
	}
	s, err := New(Config{HostKey: newKey(f), Store: st, Builder: b, TempDir: f.TempDir()})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		if err := s.Close(); err != nil {
			f.Error(err)
		}
		if err := st.Close(); err != nil {
			f.Error(err)
		}
	})
	return s, a
}
