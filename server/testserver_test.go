package server

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"nbd/nixproto"
	"nbd/nixproto/nar"
	"nbd/store"
)

// patience is how long a test waits for what should come at once.
const patience = 30 * time.Second

// A testServer is a Server on a port of its own, with a real store and a
// Builder that the test makes up.
type testServer struct {
	*Server
	t       testing.TB
	store   *store.Store
	builder *fakeBuilder
	addr    string
	log     *syncBuffer
	alice   gossh.Signer // key of the account alice, with all permissions
	account store.Account
}

// newTestServer starts a server; change, if not nil, changes its Config.
func newTestServer(t testing.TB, change func(*Config)) *testServer {
	t.Helper()
	st, err := store.Open(t.TempDir(), store.Config{ServerName: "test", MinFree: -1})
	if err != nil {
		t.Fatal(err)
	}
	ts := &testServer{t: t, store: st, builder: &fakeBuilder{store: st}, log: new(syncBuffer)}
	cfg := Config{
		HostKey: newKey(t), Store: st, Builder: ts.builder, Version: "9.9", TempDir: t.TempDir(),
		Logger: slog.New(slog.NewTextHandler(ts.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if change != nil {
		change(&cfg)
	}
	if ts.Server, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	ts.alice = newKey(t)
	ts.account = ts.addAccount("alice", ts.alice, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ts.addr = l.Addr().String()
	served := make(chan error, 1)
	go func() { served <- ts.Serve(l) }()
	t.Cleanup(func() {
		if err := ts.Close(); err != nil {
			t.Error(err)
		}
		if err := <-served; !errors.Is(err, ErrClosed) {
			t.Errorf("Serve: %v", err)
		}
		if err := st.Close(); err != nil {
			t.Error(err)
		}
		if strings.Contains(ts.log.String(), "panic=") {
			t.Errorf("a session panicked:\n%s", ts.log)
		}
		if t.Failed() {
			t.Logf("server's log:\n%s", ts.log)
		}
	})
	return ts
}

func newKey(t testing.TB) gossh.Signer {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := gossh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

// addAccount makes an account with a key that has the permissions, nil for all.
func (ts *testServer) addAccount(name string, key gossh.Signer, permissions []string) store.Account {
	ts.t.Helper()
	k := store.Key{Wire: key.PublicKey().Marshal(), Permissions: permissions}
	a, err := ts.store.AddAccount(ts.t.Context(), name, k)
	if err != nil {
		ts.t.Fatal(err)
	}
	return a
}

// addKey gives alice another key.
func (ts *testServer) addKey(permissions ...string) gossh.Signer {
	ts.t.Helper()
	key := newKey(ts.t)
	k := store.Key{Wire: key.PublicKey().Marshal(), Permissions: permissions}
	if _, err := ts.store.AddKey(ts.t.Context(), ts.account.ID, k); err != nil {
		ts.t.Fatal(err)
	}
	return key
}

func (ts *testServer) clientConfig(key gossh.Signer) *gossh.ClientConfig {
	return &gossh.ClientConfig{
		User: "anybody", Auth: []gossh.AuthMethod{gossh.PublicKeys(key)},
		HostKeyCallback: gossh.FixedHostKey(ts.cfg.HostKey.PublicKey()), Timeout: patience,
	}
}

// dial opens a connection with a key.
func (ts *testServer) dial(key gossh.Signer) *gossh.Client {
	ts.t.Helper()
	c, err := gossh.Dial("tcp", ts.addr, ts.clientConfig(key))
	if err != nil {
		ts.t.Fatal(err)
	}
	ts.t.Cleanup(func() { _ = c.Close() })
	return c
}

// A pipe is one session's streams.
type pipe struct {
	*gossh.Session
	io.Reader
	io.WriteCloser
	stderr *syncBuffer
}

// exec starts a command in a session of c.
func (ts *testServer) exec(c *gossh.Client, command string) *pipe {
	ts.t.Helper()
	s, err := c.NewSession()
	if err != nil {
		ts.t.Fatal(err)
	}
	p := &pipe{Session: s, stderr: new(syncBuffer)}
	s.Stderr = p.stderr
	if p.WriteCloser, err = s.StdinPipe(); err == nil {
		p.Reader, err = s.StdoutPipe()
	}
	if err == nil {
		err = s.Start(command)
	}
	if err != nil {
		ts.t.Fatal(err)
	}
	return p
}

// Close closes the writing side: what a client does that is done.
func (p *pipe) Close() error { return p.WriteCloser.Close() }

// status waits for the end of a session and returns its exit status.
func (p *pipe) status(t *testing.T) int {
	t.Helper()
	err := p.Wait()
	var exit *gossh.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitStatus()
	default:
		t.Errorf("session ended with %v", err)
		return -1
	}
}

// A workerClient is a client of the worker protocol that remembers messages.
type workerClient struct {
	*nixproto.Client
	pipe *pipe
	mu   sync.Mutex
	log  []string
}

// worker opens a session of the worker protocol.
func (ts *testServer) worker(key gossh.Signer) *workerClient {
	ts.t.Helper()
	w, err := ts.tryWorker(key, nixproto.Hello{Version: nixproto.MaxWorker})
	if err != nil {
		ts.t.Fatal(err)
	}
	return w
}

func (ts *testServer) tryWorker(key gossh.Signer, hello nixproto.Hello) (*workerClient, error) {
	ts.t.Helper()
	w := &workerClient{pipe: ts.exec(ts.dial(key), "nix-daemon --stdio")}
	ids := map[uint64]int{}
	var err error
	w.Client, err = nixproto.NewClient(w.pipe, hello, func(m nixproto.LogMessage) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.log = append(w.log, shape(ids, m))
	})
	return w, err
}

// do is Client.Do for a request that has to succeed.
func (w *workerClient) do(t *testing.T, req nixproto.Request, body func(*nixproto.Writer) error) nixproto.Response {
	t.Helper()
	resp, err := w.Do(req, body)
	if err != nil {
		t.Fatalf("%s: %v", req.Op(), err)
	}
	return resp
}

// refused is Client.Do for a request that has to be answered with an error,
// which it returns.
func (w *workerClient) refused(t *testing.T, req nixproto.Request, body func(*nixproto.Writer) error) string {
	t.Helper()
	_, err := w.Do(req, body)
	var refusal *nixproto.LogError
	if !errors.As(err, &refusal) {
		t.Fatalf("%s: got %v, want an error of the server", req.Op(), err)
	}
	return refusal.Message
}

// serveClient opens a session of the serve protocol.
func (ts *testServer) serveClient(key gossh.Signer) (*nixproto.ServeClient, *pipe) {
	ts.t.Helper()
	p := ts.exec(ts.dial(key), "nix-store --serve --write")
	c, err := nixproto.NewServeClient(p, nixproto.MaxServe)
	if err != nil {
		ts.t.Fatal(err)
	}
	return c, p
}

// A testPath is a path with its NAR.
type testPath struct {
	nixproto.PathInfo
	nar []byte
}

// narOf returns the NAR of a plain file.
func narOf(t testing.TB, contents string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := nar.NewWriter(&b)
	err := w.File("", false, int64(len(contents)))
	if err == nil {
		_, err = io.WriteString(w, contents)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// textPath returns a text object: its path follows from its content.
func textPath(t testing.TB, name, contents string, refs ...nixproto.StorePath) testPath {
	t.Helper()
	sum := nixproto.SumSHA256([]byte(contents))
	p, err := nixproto.MakeTextPath(name, sum, refs)
	if err != nil {
		t.Fatal(err)
	}
	ca := nixproto.ContentAddress{Method: nixproto.CAText, Hash: sum}.String()
	return made(t, nixproto.PathInfo{Path: p, References: refs, CA: ca}, narOf(t, contents))
}

// builtPath returns an input-addressed object.
func builtPath(t testing.TB, name, contents string, refs ...nixproto.StorePath) testPath {
	t.Helper()
	sum := nixproto.SumSHA256([]byte(name + contents))
	p := nixproto.StorePath(nixproto.StoreDir + "/" + sum.Base32()[:nixproto.HashPartLen] + "-" + name)
	return made(t, nixproto.PathInfo{Path: p, References: refs}, narOf(t, contents))
}

func made(t testing.TB, info nixproto.PathInfo, nar []byte) testPath {
	info.NarHash, info.NarSize = nixproto.SumSHA256(nar), uint64(len(nar))
	return testPath{info, nar}
}

// burst writes the stream of AddMultipleToStore.
func burst(paths ...testPath) func(*nixproto.Writer) error {
	return func(w *nixproto.Writer) error {
		w.Uint64(uint64(len(paths)))
		for _, p := range paths {
			if err := nixproto.WritePathInfo(w, &p.PathInfo); err != nil {
				return err
			}
			if _, err := w.Write(p.nar); err != nil {
				return err
			}
		}
		return nil
	}
}

// raw writes bytes as a stream.
func raw(b []byte) func(*nixproto.Writer) error {
	return func(w *nixproto.Writer) error { _, err := w.Write(b); return err }
}

// upload brings paths into the view of an account, past the server.
func (ts *testServer) upload(a store.AccountID, paths ...testPath) {
	ts.t.Helper()
	up, err := ts.store.NewUpload(ts.t.Context(), a, store.UploadOptions{})
	if err != nil {
		ts.t.Fatal(err)
	}
	defer up.Abort()
	for _, p := range paths {
		info := p.PathInfo
		if err := up.Add(&info, bytes.NewReader(p.nar)); err != nil {
			ts.t.Fatalf("%s: %v", p.Path, err)
		}
	}
	if err := up.Commit(); err != nil {
		ts.t.Fatal(err)
	}
}

// A fakeBuilder does what its fields say; the zero value refuses all builds.
type fakeBuilder struct {
	store   *store.Store
	build   func(ctx context.Context, s *Session, req *BuildRequest, log LogSink) (*nixproto.BuildResult, error)
	paths   func(ctx context.Context, s *Session, req *PathsRequest, log LogSink) ([]nixproto.KeyedBuildResult, error)
	missing func(paths []nixproto.DerivedPath) (*Missing, error)
	outputs func(drv nixproto.StorePath) (map[string]nixproto.StorePath, error)
}

func (b *fakeBuilder) Build(ctx context.Context, s *Session, req *BuildRequest, log LogSink) (*nixproto.BuildResult, error) {
	if b.build == nil {
		return nil, refusef("nothing is built here")
	}
	return b.build(ctx, s, req, log)
}

// BuildPaths makes valid paths valid unless b.paths knows better.
func (b *fakeBuilder) BuildPaths(ctx context.Context, s *Session, req *PathsRequest, log LogSink) ([]nixproto.KeyedBuildResult, error) {
	if b.paths != nil {
		return b.paths(ctx, s, req, log)
	}
	var results []nixproto.KeyedBuildResult
	for _, p := range req.Paths {
		r := nixproto.KeyedBuildResult{Path: p, BuildResult: nixproto.BuildResult{Status: nixproto.AlreadyValid}}
		if _, err := b.store.Info(ctx, s.Client.Account.ID, p.Path); err != nil || p.Built() {
			r.Status, r.Error = nixproto.NoSubstituters, "there is no '"+string(p.Path)+"'"
		}
		results = append(results, r)
	}
	return results, nil
}

func (b *fakeBuilder) Missing(_ context.Context, _ *Session, paths []nixproto.DerivedPath) (*Missing, error) {
	if b.missing == nil {
		return &Missing{}, nil
	}
	return b.missing(paths)
}

func (b *fakeBuilder) OutputMap(_ context.Context, _ *Session, drv nixproto.StorePath) (map[string]nixproto.StorePath, error) {
	if b.outputs == nil {
		return nil, store.ErrNotFound
	}
	return b.outputs(drv)
}

// A syncBuffer is a bytes.Buffer for several goroutines.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
