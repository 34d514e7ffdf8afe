package upstream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"nbd/nixproto"
	"nbd/vm/egress"
)

const golden = "../../testdata/cache"

// A clock is set by hand.
type clock struct {
	mu sync.Mutex // guards t
	t  time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

// testClient returns a client that waits for nothing, and has a clock.
func testClient(t *testing.T, cfg Config) (*Client, *clock) {
	t.Helper()
	ck := &clock{t: time.Unix(1e9, 0)}
	cfg.now = ck.now
	cfg.wait = func(context.Context, time.Duration) {}
	c := New(cfg)
	t.Cleanup(c.Close)
	return c, ck
}

// source returns a source on this machine, which accounts may reach.
func source(t *testing.T, s string, operator bool) Source {
	t.Helper()
	src, err := ParseSource(s, operator)
	if err == nil {
		src.Rule, err = egress.ParseRule([]string{"127.0.0.0/8"})
	}
	if err != nil {
		t.Fatal(err)
	}
	return src
}

// goldenPaths are those of every golden cache: top, dep and source.
func goldenPaths(t testing.TB) []nixproto.StorePath {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(golden, "paths"))
	if err != nil {
		t.Fatal(err)
	}
	var paths []nixproto.StorePath
	for s := range strings.FieldsSeq(string(text)) {
		paths = append(paths, nixproto.StorePath(s))
	}
	return append(paths, "/nix/store/1na70a4bmpq9akpf9kv936nvvfnxi4p9-dep")
}

// readNAR reads a whole NAR and compares it with its hash.
func readNAR(ctx context.Context, k *Cache, n *nixproto.NarInfo) error {
	r, err := k.Open(ctx, n)
	if err != nil {
		return err
	}
	defer r.Close()
	h := nixproto.NewHasher(nixproto.SHA256)
	size, err := io.Copy(h, r)
	if err == nil {
		err = r.Finish()
	}
	if err == nil && (nixproto.HashFromSum(nixproto.SHA256, h) != n.NarHash || uint64(size) != n.NarSize) {
		err = errors.New("another NAR")
	}
	return err
}

// Caches that real Nix made, in each compression, over HTTP and as a folder.
func TestGolden(t *testing.T) {
	ctx := context.Background()
	c, _ := testClient(t, Config{})
	for _, compression := range []string{"xz", "zstd", "bzip2", "gzip", "br", "none"} {
		dir, err := filepath.Abs(filepath.Join(golden, compression))
		if err != nil {
			t.Fatal(err)
		}
		web := httptest.NewServer(http.FileServer(http.Dir(dir)))
		defer web.Close()
		for _, k := range []*Cache{
			c.Cache(source(t, web.URL, false), Tokens{}),
			c.Cache(source(t, "file://"+dir, true), Tokens{}),
		} {
			if info, err := k.Info(ctx); err != nil || info.StoreDir != nixproto.StoreDir {
				t.Errorf("%s: %v", k, err)
			}
			for _, p := range goldenPaths(t) {
				n, err := k.NarInfo(ctx, p)
				if err != nil {
					t.Fatal(err)
				}
				if err := readNAR(ctx, k, n); err != nil {
					t.Errorf("%s %s: %v", k, p, err)
				}
			}
			if _, err := k.NarInfo(ctx, absent); !errors.Is(err, ErrNotFound) {
				t.Errorf("absent path: %v", err)
			}
		}
	}
}

const absent = nixproto.StorePath("/nix/store/00000000000000000000000000000000-absent")

// A site of a test: it counts requests, and answers by the handlers of paths,
// else from a golden cache.
type testSite struct {
	*httptest.Server
	mu       sync.Mutex // guards what follows
	seen     []string   // paths, with "!" before those that had a credential
	handlers map[string]http.HandlerFunc
}

func newTestSite(t *testing.T) *testSite {
	s := &testSite{handlers: map[string]http.HandlerFunc{}}
	files := http.FileServer(http.Dir(filepath.Join(golden, "xz")))
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		mark := ""
		if r.Header.Get("Authorization") != "" {
			mark = "!"
		}
		s.seen = append(s.seen, mark+r.URL.Path)
		h := s.handlers[r.URL.Path]
		s.mu.Unlock()
		if h == nil {
			h = files.ServeHTTP
		}
		h(w, r)
	}))
	t.Cleanup(s.Server.CloseClientConnections)
	t.Cleanup(s.Server.Close)
	return s
}

func (s *testSite) handle(path string, h http.HandlerFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.handlers[path] = h
}

// requests returns what was asked for since the last call.
func (s *testSite) requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	seen := s.seen
	s.seen = nil
	return seen
}

// cacheInfo is the path of a cache's own description, depInfo that of a narinfo
// that every golden cache has.
const (
	cacheInfo = "/nix-cache-info"
	depInfo   = "/1na70a4bmpq9akpf9kv936nvvfnxi4p9.narinfo"
	depPath   = nixproto.StorePath("/nix/store/1na70a4bmpq9akpf9kv936nvvfnxi4p9-dep")
)

func TestMemory(t *testing.T) {
	ctx := context.Background()
	c, ck := testClient(t, Config{})
	s := newTestSite(t)
	k := c.Cache(source(t, s.URL, false), Tokens{})
	ask := func(k *Cache, p nixproto.StorePath, want ...string) {
		t.Helper()
		_, err := k.NarInfo(ctx, p)
		if err != nil && !errors.Is(err, ErrNotFound) {
			t.Error(err)
		}
		if got := s.requests(); !slices.Equal(got, want) {
			t.Errorf("requests %q, want %q", got, want)
		}
	}
	gone := "/" + absent.HashPart() + ".narinfo"
	ask(k, depPath, cacheInfo, depInfo)
	ask(k, depPath)
	ask(k, absent, gone)
	ask(k, absent)
	tokens := tokensOf(t, "127.0.0.1=secret")
	ask(c.Cache(source(t, s.URL, false), tokens), absent, "!"+cacheInfo, "!"+gone)
	ask(c.Cache(source(t, s.URL, true), Tokens{}), absent, cacheInfo, gone)
	ck.pass(61 * time.Second)
	ask(k, absent, gone)
	ask(k, depPath)
	ck.pass(11 * time.Minute)
	ask(k, depPath, cacheInfo, depInfo)
}

func TestMemoryBounded(t *testing.T) {
	m := newMemory(100*entrySize, time.Now)
	for i := range 1000 {
		m.put(memoryKey{path: fmt.Sprint(i)}, remembered{err: ErrNotFound}, 0, time.Hour)
	}
	if len(m.entries) != 100 || m.order.Len() != 100 || m.size > m.max {
		t.Errorf("%d entries, %d bytes", len(m.entries), m.size)
	}
	if _, ok := m.get(memoryKey{path: "999"}); !ok {
		t.Error("the newest is gone")
	}
	m.put(memoryKey{path: "large"}, remembered{}, m.max, time.Hour)
	if _, ok := m.get(memoryKey{path: "large"}); ok || m.size > m.max {
		t.Error("an entry took all the room")
	}
}

// A cache that does not answer costs one attempt a minute.
func TestDead(t *testing.T) {
	ctx := context.Background()
	c, ck := testClient(t, Config{})
	s := newTestSite(t)
	s.Close()
	k := c.Cache(source(t, s.URL, false), Tokens{})
	first := errors.New("")
	for i := range 3 {
		_, err := k.NarInfo(ctx, depPath)
		if !errors.Is(err, ErrUnavailable) || i > 0 && err != first {
			t.Errorf("request %d: %v", i, err)
		}
		first = err
	}
	ck.pass(59 * time.Second)
	if _, err := k.Info(ctx); err != first {
		t.Errorf("asked again before its time: %v", err)
	}
	ck.pass(2 * time.Second)
	if _, err := k.Info(ctx); err == first || !errors.Is(err, ErrUnavailable) {
		t.Errorf("after its time: %v", err)
	}
}

// All that ask at once wait for the one probe, and one that dies later is left
// out, too.
func TestProbeShared(t *testing.T) {
	ctx := context.Background()
	c, ck := testClient(t, Config{})
	s := newTestSite(t)
	release := make(chan struct{})
	s.handle(cacheInfo, func(w http.ResponseWriter, _ *http.Request) {
		<-release
		fmt.Fprint(w, "StoreDir: /nix/store\n")
	})
	k := c.Cache(source(t, s.URL, false), Tokens{})
	short, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	for i := range 8 {
		ctx := ctx
		if i == 0 {
			ctx = short
		}
		all.Go(func() {
			if _, err := k.Info(ctx); err != nil && ctx != short {
				t.Error(err)
			}
		})
	}
	cancel()
	close(release)
	all.Wait()
	if got := s.requests(); len(got) != 1 {
		t.Errorf("requests %q", got)
	}
	s.handle(depInfo, func(w http.ResponseWriter, _ *http.Request) { panic(http.ErrAbortHandler) })
	if _, err := k.NarInfo(ctx, depPath); !errors.Is(err, ErrUnavailable) {
		t.Error(err)
	}
	s.requests()
	if _, err := k.NarInfo(ctx, absent); !errors.Is(err, ErrUnavailable) || len(s.requests()) > 0 {
		t.Errorf("a cache that died: %v", err)
	}
	ck.pass(2 * time.Minute)
	if _, err := k.NarInfo(ctx, absent); !errors.Is(err, ErrNotFound) {
		t.Errorf("a cache that came back: %v", err)
	}
}

func TestNoCache(t *testing.T) {
	ctx := context.Background()
	c, _ := testClient(t, Config{})
	for name, h := range map[string]http.HandlerFunc{
		"absent":      http.NotFound,
		"other store": func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "StoreDir: /gnu/store\n") },
		"malformed":   func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "Priority: x\n") },
		"long":        func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(bytes.Repeat([]byte("x"), 5<<20)) },
		"broken":      func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) },
		"closed":      func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401) },
	} {
		s := newTestSite(t)
		s.handle(cacheInfo, h)
		if _, err := c.Cache(source(t, s.URL, false), Tokens{}).NarInfo(ctx, depPath); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMalformedNarInfo(t *testing.T) {
	ctx := context.Background()
	for name, text := range map[string]string{
		"empty": "", "html": "<html>\n",
		"other path": "StorePath: /nix/store/00000000000000000000000000000000-absent\nURL: x\nNarHash: sha256:08q8yq76h2m646qqjkg89ysg1q1hqwhpj5f5glc6kqyqfrm1qsb5\nNarSize: 1568\nReferences: \n",
	} {
		c, _ := testClient(t, Config{})
		s := newTestSite(t)
		s.handle(depInfo, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, text) })
		k := c.Cache(source(t, s.URL, false), Tokens{})
		if _, err := k.NarInfo(ctx, depPath); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := k.NarInfo(ctx, "/nix/store/0w8qkv1f2a7wvbpk4v78i2v8g121j004-top"); err != nil {
			t.Errorf("%s spoils the cache: %v", name, err)
		}
	}
}

func TestOrder(t *testing.T) {
	ctx := context.Background()
	c, _ := testClient(t, Config{})
	var caches []*Cache
	for _, s := range []struct{ priority, query string }{{"40", ""}, {"30", ""}, {"50", "?priority=10"}, {"30", ""}, {"dead", ""}} {
		site := newTestSite(t)
		site.handle(cacheInfo, func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintf(w, "StoreDir: /nix/store\nPriority: %s\n", s.priority)
		})
		caches = append(caches, c.Cache(source(t, site.URL+"/"+s.query, false), Tokens{}))
		site.handle("/"+cacheInfo, site.handlers[cacheInfo])
	}
	got, faults := Order(ctx, caches)
	if !slices.Equal(got, []*Cache{caches[2], caches[1], caches[3], caches[0]}) || len(faults) != 1 || !errors.Is(faults[0], ErrUnavailable) {
		t.Errorf("%v, %v", got, faults)
	}
}

func TestParseSource(t *testing.T) {
	for _, s := range []string{
		"", "x", "cache.nixos.org", "ftp://h/", "s3://bucket", "http://", "http:///x", "https://h:0/", "https://h:99999/", "http:h/x",
		"https://h/?priority=x", "https://%zz/", "file:///srv", "https://" + strings.Repeat("h", maxURL),
	} {
		if src, err := ParseSource(s, false); err == nil {
			t.Errorf("%q: %v", s, src)
		}
	}
	for _, s := range []string{"file://host/srv", "file://srv", "file:srv", "file://u:p@/srv"} {
		if src, err := ParseSource(s, true); err == nil {
			t.Errorf("%q: %v", s, src)
		}
	}
	src := source(t, "https://user:secret@Cache.Example:8443/nix/?priority=3&trusted=1#x", false)
	if src.String() != "https://cache.example:8443/nix" || *src.priority != 3 || src.auth != "Basic dXNlcjpzZWNyZXQ=" {
		t.Errorf("%s %+v", src, src)
	}
	if _, err := ParseSource("ftp://user:secret@h/", false); strings.Contains(err.Error(), "secret") {
		t.Error(err)
	}
}

// tokensOf returns tokens written "place=secret".
func tokensOf(t *testing.T, entries ...string) (tokens Tokens) {
	t.Helper()
	for _, e := range entries {
		place, secret, _ := strings.Cut(e, "=")
		if err := tokens.Add(place, secret); err != nil {
			t.Fatal(err)
		}
	}
	return tokens
}

func TestTokens(t *testing.T) {
	tokens := tokensOf(t, "a.example=one", "B.example=user:pass", "a.example:8080=two", "a.example:443=a=b", "b.example/team/=three")
	for u, want := range map[string]string{
		"http://a.example/": "Bearer one", "https://b.example/x": "Basic dXNlcjpwYXNz", "http://a.example:8080": "Bearer two",
		"https://a.example": "Bearer a=b", "http://c.example": "", "http://x.a.example": "", "http://a.example.com": "",
		"https://b.example/team/cache": "Bearer three", "https://b.example/teams": "Basic dXNlcjpwYXNz", "https://b.example/team": "Bearer three",
	} {
		if got := tokens.authorization(source(t, u, false).url); got != want {
			t.Errorf("%s: %q", u, got)
		}
	}
	if err := tokens.Add("x", "a\nb"); err == nil {
		t.Error("a token with a line end")
	}
}
