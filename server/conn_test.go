package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	gossh "golang.org/x/crypto/ssh"

	"nbd/nixproto"
)

func TestHandshake(t *testing.T) {
	ts := newTestServer(t, nil)
	for v := nixproto.MinWorker; v <= nixproto.MaxWorker+1; v++ {
		w, err := ts.tryWorker(ts.alice, nixproto.Hello{Version: v})
		if err != nil {
			t.Fatalf("%v: %v", v, err)
		}
		want := nixproto.Hello{Version: nixproto.MaxWorker}
		if v.Minor() >= 33 {
			want.Nix = "nbd 9.9"
		}
		if v.Minor() >= 35 {
			want.Trust = nixproto.Trusted
		}
		if diff := cmp.Diff(want, w.Server, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%v: %s", v, diff)
		}
		if got := *w.do(t, &nixproto.IsValidPath{Path: testDrv}, nil).(*nixproto.Bool); got {
			t.Errorf("%v: a path is valid in an empty store", v)
		}
		if err := w.pipe.Close(); err != nil {
			t.Error(err)
		}
		if status := w.pipe.status(t); status != 0 {
			t.Errorf("%v: exit status %d after the end", v, status)
		}
	}
}

func TestHandshakeUntrusted(t *testing.T) {
	ts := newTestServer(t, nil)
	if w := ts.worker(ts.addKey("build:write", "store:read")); w.Server.Trust != nixproto.NotTrusted {
		t.Errorf("a key without store:write has trust %d", w.Server.Trust)
	}
}

// TestTooOld: a client that is too old prints one line that says so.
func TestTooOld(t *testing.T) {
	ts := newTestServer(t, nil)
	for _, v := range []nixproto.Version{1<<8 | 10, 1<<8 | 21, 1<<8 | 31} {
		p := ts.exec(ts.dial(ts.alice), "nix-daemon --stdio")
		w := nixproto.NewWriter(p)
		for _, n := range []uint64{0x6e697863, uint64(v), 0, 0} {
			w.Uint64(n)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		r := nixproto.NewReader(p)
		r.Uint64() // magic
		r.Uint64() // version
		m, err := nixproto.ReadLog(r, v)
		refusal, ok := m.(*nixproto.LogError)
		if err != nil || !ok || !strings.Contains(refusal.Message, "1.32") || strings.Contains(refusal.Message, "\n") {
			t.Errorf("%v: got %v, %v", v, m, err)
		}
		if status := p.status(t); status != 1 {
			t.Errorf("%v: exit status %d", v, status)
		}
	}
	p := ts.exec(ts.dial(ts.alice), "nix-store --serve --write")
	_, err := nixproto.NewServeClient(p, 2<<8|4)
	if err == nil {
		t.Error("a serve client of version 2.4 is not refused by anybody")
	}
	if status := p.status(t); status != 1 || !strings.Contains(p.stderr.String(), "2.5") {
		t.Errorf("serve 2.4: exit status %d, %q", status, p.stderr)
	}
}

// TestGarbage: whatever comes instead of a protocol ends one session, with a
// sentence on stderr.
func TestGarbage(t *testing.T) {
	ts := newTestServer(t, nil)
	c := ts.dial(ts.alice)
	for _, command := range []string{"nix-daemon --stdio", "nix-store --serve --write"} {
		for _, in := range []string{"GET / HTTP/1.1\r\n\r\n", strings.Repeat("\xff", 1000), "cxin\x00\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff"} {
			p := ts.exec(c, command)
			if _, err := io.WriteString(p, in); err != nil {
				t.Fatal(err)
			}
			if status := p.status(t); status != 1 {
				t.Errorf("%s, %.20q: exit status %d", command, in, status)
			}
			if lines := strings.Count(p.stderr.String(), "\n"); lines != 1 || !strings.HasPrefix(p.stderr.String(), "nbd: error: ") {
				t.Errorf("%s, %.20q: %q", command, in, p.stderr)
			}
		}
	}
}

func TestUnknownOperation(t *testing.T) {
	ts := newTestServer(t, nil)
	for _, op := range []uint64{0, 2, 16, 24, 27, 48, 1000, 1<<64 - 1} {
		w := ts.worker(ts.alice)
		w.Writer.Uint64(op)
		if err := w.Writer.Flush(); err != nil {
			t.Fatal(err)
		}
		err := w.Wait()
		var refusal *nixproto.LogError
		if !errors.As(err, &refusal) || !strings.Contains(refusal.Message, fmt.Sprint(op)) {
			t.Errorf("%d: got %v", op, err)
		}
		if status := w.pipe.status(t); status != 1 {
			t.Errorf("%d: exit status %d", op, status)
		}
	}
	c, p := ts.serveClient(ts.alice)
	c.Writer.Uint64(77)
	if err := c.Writer.Flush(); err != nil {
		t.Fatal(err)
	}
	if status := p.status(t); status != 1 || !strings.Contains(p.stderr.String(), "77") {
		t.Errorf("serve: exit status %d, %q", status, p.stderr)
	}
}

// TestBadValue: a request with a value that cannot be is answered, and the
// connection goes on.
func TestBadValue(t *testing.T) {
	ts := newTestServer(t, nil)
	w := ts.worker(ts.alice)
	for _, path := range []nixproto.StorePath{"/gnu/store/00000000000000000000000000000000-a", "/nix/store/short", "x"} {
		if msg := w.refused(t, &nixproto.QueryPathInfo{Path: path}, nil); !strings.Contains(msg, filepath.Base(string(path))) {
			t.Errorf("%s: %q", path, msg)
		}
	}
	if msg := w.refused(t, &nixproto.QueryPathInfo{Path: "/gnu/store/00000000000000000000000000000000-a"}, nil); !strings.Contains(msg, "/nix/store") {
		t.Errorf("another store directory: %q", msg)
	}
	bad := builtPath(t, "x", "y")
	bad.Path = "/nix/store/nonsense"
	w.refused(t, &nixproto.AddToStoreNar{Info: bad.PathInfo}, raw(bad.nar))
	w.refused(t, &nixproto.AddMultipleToStore{}, burst(bad))
	w.do(t, &nixproto.IsValidPath{Path: testDrv}, nil)
}

// TestMinorOperations: what little there is to say.
func TestMinorOperations(t *testing.T) {
	ts := newTestServer(t, nil)
	w := ts.worker(ts.alice)
	for _, test := range []struct {
		req  nixproto.Request
		want nixproto.Response // nil for none
	}{
		{&nixproto.SetOptions{MaxSilentTime: 7}, nil},
		{&nixproto.SyncWithGC{}, &nixproto.Done{}},
		{&nixproto.OptimiseStore{}, &nixproto.Done{}},
		{&nixproto.AddTempRoot{Path: testDrv}, &nixproto.Done{}},
		{&nixproto.FindRoots{}, &nixproto.Roots{}},
		{&nixproto.QuerySubstitutablePaths{Paths: []nixproto.StorePath{testDrv}}, &nixproto.PathSet{}},
		{&nixproto.QuerySubstitutablePathInfos{}, &nixproto.SubstitutablePathInfos{}},
		{&nixproto.QueryPathFromHashPart{HashPart: testDrv.HashPart()}, new(nixproto.OptionalPath)},
		{&nixproto.QueryAllValidPaths{}, &nixproto.PathSet{}},
		{&nixproto.QueryValidDerivers{Path: testDrv}, &nixproto.PathSet{}},
		{&nixproto.VerifyStore{CheckContents: true}, new(nixproto.Bool)},
		{&nixproto.QueryPathInfo{Path: testDrv}, &nixproto.OptionalPathInfo{}},
		{&nixproto.QueryMissing{}, &nixproto.Missing{}},
	} {
		got := w.do(t, test.req, nil)
		opts := cmp.Options{cmpopts.EquateEmpty(), cmpopts.IgnoreUnexported(nixproto.OptionalPathInfo{})}
		if diff := cmp.Diff(test.want, got, opts); diff != "" {
			t.Errorf("%s: %s", test.req.Op(), diff)
		}
	}
	for _, req := range []nixproto.Request{
		&nixproto.AddIndirectRoot{Link: "/home/alice/result"}, &nixproto.AddPermRoot{Path: testDrv, Link: "/x"},
		&nixproto.EnsurePath{Path: testDrv}, &nixproto.NarFromPath{Path: testDrv}, &nixproto.QueryReferrers{Path: testDrv},
		&nixproto.QueryDeriver{Path: testDrv}, &nixproto.QueryDerivationOutputMap{Path: testDrv},
		&nixproto.AddSignatures{Path: testDrv, Signatures: []string{"x"}},
		&nixproto.CollectGarbage{Action: nixproto.GCDeleteSpecific, Paths: []nixproto.StorePath{testDrv}},
		&nixproto.BuildDerivation{DrvPath: "/nix/store/00000000000000000000000000000000-a", Derivation: &nixproto.Derivation{}},
	} {
		w.refused(t, req, nil)
	}
}

// TestBuildLog: the messages of a build arrive while it runs, its result after
// them.
func TestBuildLog(t *testing.T) {
	ts := newTestServer(t, nil)
	seen := make(chan struct{})
	ts.builder.build = func(ctx context.Context, s *Session, req *BuildRequest, log LogSink) (*nixproto.BuildResult, error) {
		b := log.StartBuild(req.DrvPath)
		fmt.Fprintln(b, "one")
		select {
		case <-seen:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		fmt.Fprint(b, "two")
		b.Stop()
		return &nixproto.BuildResult{Status: nixproto.PermanentFailure, Error: "it failed", StopTime: 7}, nil
	}
	w := &workerClient{pipe: ts.exec(ts.dial(ts.alice), "nix-daemon --stdio")}
	var lines []string
	var err error
	w.Client, err = nixproto.NewClient(w.pipe, nixproto.Hello{Version: nixproto.MaxWorker}, func(m nixproto.LogMessage) {
		if m, ok := m.(*nixproto.LogResult); ok {
			lines = append(lines, m.Fields[0].Text)
			if len(lines) == 1 {
				close(seen) // the first line came while the build waits
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	got := w.do(t, &nixproto.BuildDerivation{DrvPath: testDrv, Derivation: &nixproto.Derivation{}}, nil).(*nixproto.BuildResult)
	if got.Status != nixproto.PermanentFailure || got.Error != "it failed" || got.StopTime != 7 {
		t.Errorf("result %+v", got)
	}
	if diff := cmp.Diff([]string{"one", "two"}, lines); diff != "" {
		t.Error(diff)
	}
}

// gone waits for the context of a build to end.
func waitGone(t *testing.T, started, ended chan struct{}, leave func()) {
	t.Helper()
	for _, step := range []chan struct{}{started, ended} {
		select {
		case <-step:
		case <-time.After(patience):
			t.Fatal("waited too long")
		}
		if step == started {
			leave()
		}
	}
}

// TestClientLeaves: a build whose client goes away, in whatever way, is told at
// once.
func TestClientLeaves(t *testing.T) {
	ts := newTestServer(t, nil)
	for name, leave := range map[string]func(c *gossh.Client, p *pipe) error{
		"connection": func(c *gossh.Client, _ *pipe) error { return c.Close() },
		"channel":    func(_ *gossh.Client, p *pipe) error { return p.Session.Close() },
		"end":        func(_ *gossh.Client, p *pipe) error { return p.Close() },
	} {
		for _, proto := range []string{"nix-daemon --stdio", "nix-store --serve --write"} {
			t.Run(name+" "+proto, func(t *testing.T) {
				started, ended := make(chan struct{}), make(chan struct{})
				ts.builder.build = func(ctx context.Context, _ *Session, _ *BuildRequest, _ LogSink) (*nixproto.BuildResult, error) {
					close(started)
					<-ctx.Done()
					close(ended)
					return nil, ctx.Err()
				}
				conn := ts.dial(ts.alice)
				p := ts.exec(conn, proto)
				if err := sendBuild(p, proto); err != nil {
					t.Fatal(err)
				}
				waitGone(t, started, ended, func() {
					if err := leave(conn, p); err != nil {
						t.Error(err)
					}
				})
			})
		}
	}
}

// sendBuild opens a protocol and asks for a build, without reading the answer.
func sendBuild(p *pipe, proto string) error {
	if strings.HasPrefix(proto, "nix-store") {
		c, err := nixproto.NewServeClient(p, nixproto.MaxServe)
		if err != nil {
			return err
		}
		return errors.Join(nixproto.WriteServeRequest(c.Writer, c.Version,
			&nixproto.ServeBuildDerivation{DrvPath: testDrv, Derivation: &nixproto.Derivation{}}), c.Writer.Flush())
	}
	c, err := nixproto.NewClient(p, nixproto.Hello{Version: nixproto.MaxWorker}, nil)
	if err != nil {
		return err
	}
	return errors.Join(nixproto.WriteRequest(c.Writer, c.Version,
		&nixproto.BuildDerivation{DrvPath: testDrv, Derivation: &nixproto.Derivation{}}), c.Writer.Flush())
}

// TestStalledClient: a client that does not read its log delays nobody else,
// and its build ends when it goes.
func TestStalledClient(t *testing.T) {
	ts := newTestServer(t, nil)
	started, ended := make(chan struct{}), make(chan struct{})
	ts.builder.build = func(ctx context.Context, _ *Session, req *BuildRequest, log LogSink) (*nixproto.BuildResult, error) {
		close(started)
		b := log.StartBuild(req.DrvPath)
		line := bytes.Repeat([]byte("x\n"), 32<<10)
		for ctx.Err() == nil {
			_, _ = b.Write(line) // blocks: more than all windows and buffers hold
		}
		close(ended)
		return nil, ctx.Err()
	}
	conn := ts.dial(ts.alice)
	p := ts.exec(conn, "nix-daemon --stdio")
	if err := sendBuild(p, "nix-daemon --stdio"); err != nil {
		t.Fatal(err)
	}
	waitGone(t, started, ended, func() {
		w := ts.worker(ts.alice)
		w.do(t, &nixproto.QueryAllValidPaths{}, nil)
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestRequestAhead: bytes that come while a build runs are the next request.
func TestRequestAhead(t *testing.T) {
	ts := newTestServer(t, nil)
	ahead := make(chan struct{})
	ts.builder.build = func(context.Context, *Session, *BuildRequest, LogSink) (*nixproto.BuildResult, error) {
		<-ahead
		return &nixproto.BuildResult{}, nil
	}
	w := ts.worker(ts.alice)
	build := &nixproto.BuildDerivation{DrvPath: testDrv, Derivation: &nixproto.Derivation{}}
	next := &nixproto.QueryAllValidPaths{}
	for _, req := range []nixproto.Request{build, next, next, build, next} {
		if err := nixproto.WriteRequest(w.Writer, w.Version, req); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Writer.Flush(); err != nil {
		t.Fatal(err)
	}
	close(ahead)
	for _, req := range []nixproto.Request{build, next, next, build, next} {
		err := w.Wait()
		if err == nil {
			_, err = nixproto.ReadResponse(w.Reader, w.Version, req)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestSessionPanics: a mistake in serving one session ends that session.
func TestSessionPanics(t *testing.T) {
	ts := newTestServer(t, nil)
	ts.builder.missing = func([]nixproto.DerivedPath) (*Missing, error) { panic("a mistake") }
	w := ts.worker(ts.alice)
	other := ts.worker(ts.alice)
	if _, err := w.Do(&nixproto.QueryMissing{}, nil); err == nil {
		t.Error("no error")
	}
	other.do(t, &nixproto.QueryAllValidPaths{}, nil)
	if !strings.Contains(ts.log.String(), "a mistake") {
		t.Error("nothing in the log")
	}
	ts.log.mu.Lock()
	ts.log.b.Reset()
	ts.log.mu.Unlock()
}

// TestBusy: what an account has under way does not take the memory of others;
// beyond that a long request is refused in a sentence, and all is given back.
func TestBusy(t *testing.T) {
	ts := newTestServer(t, nil)
	bobKey := newKey(t)
	ts.addAccount("bob", bobKey, nil)
	long := &nixproto.QueryValidPaths{}
	for i := range 40_000 {
		long.Paths = append(long.Paths, nixproto.StorePath(fmt.Sprintf("/nix/store/%032d-x", i)))
	}
	under := ts.store.NewCharge(ts.account.ID)
	n := int64(1 << 40)
	for ; under.Set(n) != nil; n /= 2 {
	}
	if got := ts.worker(ts.alice).refused(t, long, nil); !strings.Contains(got, "too much is under way at once") || !strings.Contains(got, "try again") {
		t.Errorf("the answer is %q", got)
	}
	serve, p := ts.serveClient(ts.alice)
	if _, err := serve.Do(&nixproto.ServeQueryValidPaths{Paths: long.Paths}, nil); err == nil || p.status(t) != 1 || !strings.Contains(p.stderr.String(), "too much is under way at once") {
		t.Errorf("over the serve protocol: %v, %q", err, p.stderr)
	}
	ts.worker(ts.alice).do(t, &nixproto.QueryValidPaths{Paths: long.Paths[:100]}, nil)
	bob := ts.worker(bobKey)
	for range 5 {
		bob.do(t, long, nil)
	}
	under.Release()
	alice := ts.worker(ts.alice)
	for range 5 {
		alice.do(t, long, nil)
	}
	for _, w := range []*workerClient{bob, alice} {
		w.do(t, &nixproto.IsValidPath{Path: testDrv}, nil) // the one before is forgotten now
	}
	if err := under.Set(n); err != nil {
		t.Errorf("what is not in memory any more still counts: %v", err)
	}
	under.Release()
}
