package server

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"nbd/nixproto"
	"nbd/server/settings"
	"nbd/server/upstream"
	"nbd/store"
)

// A fakeCache is a binary cache over HTTP.
type fakeCache struct {
	*httptest.Server
	key nixproto.SigningKey

	mu    sync.Mutex // guards what follows
	files map[string][]byte
	hold  chan struct{} // if not nil, NARs wait for it
	nars  int           // that were asked for
	asked int           // requests
}

func newFakeCache(t testing.TB) *fakeCache {
	t.Helper()
	key, err := nixproto.GenerateSigningKey("cache-1", rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &fakeCache{key: key, files: map[string][]byte{"/nix-cache-info": []byte("StoreDir: /nix/store\n")}}
	c.Server = httptest.NewServer(c)
	t.Cleanup(func() { c.CloseClientConnections(); c.Close() })
	return c
}

func (c *fakeCache) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	b, ok := c.files[r.URL.Path]
	c.asked++
	hold := c.hold
	if strings.HasPrefix(r.URL.Path, "/nar/") {
		c.nars++
	} else {
		hold = nil
	}
	c.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-r.Context().Done():
		}
	}
	if !ok {
		http.NotFound(w, r)
		return
	}
	_, _ = w.Write(b)
}

// add puts paths into the cache; change, if not nil, changes a narinfo after it
// was signed.
func (c *fakeCache) add(t testing.TB, change func(*nixproto.NarInfo), paths ...testPath) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range paths {
		n := nixproto.NarInfo{PathInfo: p.PathInfo, URL: "nar/" + p.NarHash.Base32(), Compression: "none"}
		n.Sign(c.key)
		c.files["/"+n.URL] = p.nar
		if change != nil {
			change(&n)
		}
		text, err := n.AppendText(nil)
		if err != nil {
			t.Fatal(err)
		}
		c.files["/"+p.Path.HashPart()+".narinfo"] = text
	}
}

// count returns how many NARs were asked for since the last call.
func (c *fakeCache) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.nars
	c.nars = 0
	return n
}

// settingsOf are settings for the caches, on the system's level.
func settingsOf(caches ...*fakeCache) map[string]string {
	var urls, keys []string
	for _, c := range caches {
		urls = append(urls, c.URL)
		keys = append(keys, c.key.Public().String())
	}
	return map[string]string{"substituters": strings.Join(urls, " "), "trusted-public-keys": strings.Join(keys, " ")}
}

// A substituterTest is a Substituter with a real store.
type substituterTest struct {
	*Substituter
	t *testing.T
}

func newSubstituterTest(t *testing.T) *substituterTest {
	t.Helper()
	st, err := store.Open(t.TempDir(), store.Config{ServerName: "test", MinFree: -1})
	if err != nil {
		t.Fatal(err)
	}
	client := upstream.New(upstream.Config{})
	t.Cleanup(func() {
		client.Close()
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	return &substituterTest{NewSubstituter(st, client, nil), t}
}

// session returns a session of a new account with settings.
func (u *substituterTest) session(name string, values map[string]string) *Session {
	u.t.Helper()
	a, err := u.store.AddAccount(u.t.Context(), name, store.Key{Wire: newKey(u.t).PublicKey().Marshal()})
	if err != nil {
		u.t.Fatal(err)
	}
	e, err := settings.Defaults().With(settings.Layer{Level: settings.System, Values: values})
	if err != nil || len(e.Notes) > 0 {
		u.t.Fatal(err, e.Notes)
	}
	sight := u.store.NewSight(a.ID, store.Trust{})
	lease := sight.NewLease()
	u.t.Cleanup(lease.Release)
	return &Session{
		ID: name, Client: &Client{Account: a}, Settings: e, Sight: sight, leases: lease,
		Log: slog.New(slog.DiscardHandler),
	}
}

// ensure calls Ensure and wants just the paths want to be usable.
func (u *substituterTest) ensure(s *Session, paths []testPath, want ...testPath) *fakeSink {
	u.t.Helper()
	sink := newFakeSink()
	have, err := u.Ensure(u.t.Context(), s, pathsOf(paths), sink)
	if err != nil || !slices.Equal(have, pathsOf(want)) {
		u.t.Errorf("have %v, want %v: %v; notes %q", have, pathsOf(want), err, sink.notes)
	}
	return sink
}

func pathsOf(list []testPath) []nixproto.StorePath {
	var paths []nixproto.StorePath
	for _, p := range list {
		paths = append(paths, p.Path)
	}
	return paths
}

// chain returns paths of which each refers to the one before.
func chain(t testing.TB, n int) []testPath {
	t.Helper()
	var paths []testPath
	for i := range n {
		var refs []nixproto.StorePath
		if i > 0 {
			refs = append(refs, paths[i-1].Path)
		}
		paths = append(paths, builtPath(t, fmt.Sprintf("p%d", i), fmt.Sprint("content ", i), refs...))
	}
	return paths
}

func TestEnsure(t *testing.T) {
	u, c := newSubstituterTest(t), newFakeCache(t)
	paths := chain(t, 20)
	large := builtPath(t, "large", strings.Repeat("0123456789abcdef", 1<<16), paths[3].Path, paths[7].Path)
	slices.Sort(large.References)
	c.add(t, func(n *nixproto.NarInfo) { n.Deriver = testDrv }, append(paths, large)...)
	s := u.session("alice", settingsOf(c))
	top := []testPath{large, builtPath(t, "absent", ""), paths[19]}
	sink := u.ensure(s, top, large, paths[19])
	if len(sink.copies) != 21 || sink.copies[0] != string(paths[0].Path)+" "+c.URL || c.count() != 21 {
		t.Errorf("copies %q", sink.copies)
	}
	for _, p := range append(paths, large) {
		info, err := u.store.Info(t.Context(), s.account(), p.Path)
		if err != nil {
			t.Fatal(err)
		}
		if keys, err := info.CheckSignatures([]nixproto.PublicKey{c.key.Public()}); err != nil || len(keys) != 1 || info.Deriver != testDrv || info.Ultimate {
			t.Errorf("%+v: %v", info, err)
		}
	}
	u.ensure(s, top, large, paths[19])
	if c.count() != 0 {
		t.Error("fetched again")
	}
	other := u.session("bob", nil)
	u.ensure(other, top)
}

// What a cache says counts only with a good signature or a content address that
// is right.
func TestEnsureTrust(t *testing.T) {
	dep := builtPath(t, "dep", "dep")
	for name, test := range map[string]struct {
		path   testPath
		change func(*nixproto.NarInfo)
		ok     bool
	}{
		"signed":            {builtPath(t, "x", "x"), nil, true},
		"unsigned":          {builtPath(t, "x", "x"), func(n *nixproto.NarInfo) { n.Signatures = nil }, false},
		"stale signature":   {builtPath(t, "x", "x", dep.Path), func(n *nixproto.NarInfo) { n.References = nil }, false},
		"content address":   {textPath(t, "x", "x"), func(n *nixproto.NarInfo) { n.Signatures = nil }, true},
		"wrong address":     {textPath(t, "x", "x"), func(n *nixproto.NarInfo) { n.CA = textPath(t, "y", "y").CA }, false},
		"address of others": {builtPath(t, "x", "x"), func(n *nixproto.NarInfo) { n.Signatures, n.CA = nil, textPath(t, "x", "x").CA }, false},
		"wrong size":        {builtPath(t, "x", "x"), func(n *nixproto.NarInfo) { n.NarSize = 1 << 40 }, false},
	} {
		u, c := newSubstituterTest(t), newFakeCache(t)
		c.add(t, test.change, test.path)
		s := u.session("alice", settingsOf(c))
		if test.ok {
			u.ensure(s, []testPath{test.path}, test.path)
		} else if sink := u.ensure(s, []testPath{test.path}); len(sink.notes) == 0 || c.count() > 0 {
			t.Errorf("%s: notes %q", name, sink.notes)
		}
	}
}

// Another cache is asked if one has wrong bytes, or none.
func TestEnsureWrongBytes(t *testing.T) {
	u, bad, good := newSubstituterTest(t), newFakeCache(t), newFakeCache(t)
	paths := chain(t, 4)
	bad.add(t, nil, paths...)
	good.key = bad.key
	good.add(t, nil, paths...)
	file := func(p testPath) string { return "/nar/" + p.NarHash.Base32() }
	bad.files[file(paths[0])] = bytes.Replace(paths[0].nar, []byte("content"), []byte("CONTENT"), 1)
	bad.files[file(paths[1])] = paths[1].nar[:100]
	bad.files[file(paths[2])] = append(bytes.Clone(paths[2].nar), 0)
	delete(bad.files, file(paths[3]))
	sink := u.ensure(u.session("alice", settingsOf(bad, good)), paths, paths...)
	if len(sink.notes) != 4 || good.count() != 4 {
		t.Errorf("notes %q", sink.notes)
	}
	s := u.session("bob", settingsOf(bad))
	u.ensure(s, paths)
	if all, err := u.store.All(t.Context(), s.account()); err != nil || len(all) > 0 {
		t.Errorf("valid: %v, %v", all, err)
	}
}

// A path is fetched only if all that it refers to can be.
func TestEnsureClosure(t *testing.T) {
	u, c := newSubstituterTest(t), newFakeCache(t)
	paths := chain(t, 5)
	c.add(t, nil, paths[1:]...)
	s := u.session("alice", settingsOf(c))
	u.ensure(s, paths[4:])
	if c.count() > 0 {
		t.Error("something was fetched")
	}
	up, err := u.store.NewUpload(t.Context(), s.account(), store.UploadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer up.Abort()
	if err := up.Add(&paths[0].PathInfo, bytes.NewReader(paths[0].nar)); err != nil {
		t.Fatal(err)
	}
	if err := up.Commit(); err != nil {
		t.Fatal(err)
	}
	u.ensure(s, paths[3:], paths[3:]...)
	// Claims that go round in a circle.
	a, b := builtPath(t, "a", "a"), builtPath(t, "b", "b")
	a.References, b.References = []nixproto.StorePath{b.Path}, []nixproto.StorePath{a.Path}
	self := builtPath(t, "self", "self")
	self.References = []nixproto.StorePath{self.Path}
	c.add(t, nil, a, b, self)
	u.ensure(s, []testPath{a, b, self}, self)
}

// Requests at the same time download once, if the same cache would give both
// the same by the same credential.
func TestEnsureShared(t *testing.T) {
	u, c := newSubstituterTest(t), newFakeCache(t)
	p := builtPath(t, "p", strings.Repeat("large enough for a file of its own ", 1<<14))
	c.add(t, nil, p)
	c.hold = make(chan struct{})
	var all sync.WaitGroup
	for i := range 4 {
		s := u.session(fmt.Sprint("account", i), settingsOf(c))
		all.Go(func() { u.ensure(s, []testPath{p}, p) })
	}
	values := settingsOf(c)
	values["substituters"] = strings.Replace(c.URL, "//", "//user:secret@", 1)
	stranger := u.session("stranger", values)
	all.Go(func() { u.ensure(stranger, []testPath{p}, p) })
	for begun := 0; begun < 5; time.Sleep(time.Millisecond) { // no event tells that somebody waits
		u.mu.Lock()
		begun = len(u.turns)
		u.mu.Unlock()
	}
	close(c.hold)
	all.Wait()
	if n := c.count(); n > 3 { // who comes after the end of the first downloads again
		t.Errorf("%d downloads for 5 accounts", n)
	}
}

func TestEnsureNothing(t *testing.T) {
	u, c := newSubstituterTest(t), newFakeCache(t)
	p := builtPath(t, "p", "p")
	c.add(t, nil, p)
	values := settingsOf(c)
	values["never-substitute"] = "true"
	u.ensure(u.session("never", values), []testPath{p})
	if c.asked > 0 {
		t.Error("never-substitute asks")
	}
	c.Close()
	sink := u.ensure(u.session("dead", settingsOf(c)), []testPath{p})
	if len(sink.notes) > 0 {
		t.Errorf("notes %q", sink.notes)
	}
	var none *Substituter
	s := u.session("none", nil)
	if have, err := none.Ensure(t.Context(), s, []nixproto.StorePath{p.Path}, nil); err != nil || len(have) > 0 {
		t.Error(have, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := u.Ensure(ctx, u.session("gone", settingsOf(newFakeCache(t))), []nixproto.StorePath{p.Path}, nil); err == nil {
		t.Error("a request that was given up has no error")
	}
}

// fetching starts a server whose clients use a cache.
func fetching(t *testing.T, c *fakeCache, extra ...string) *testServer {
	client := upstream.New(upstream.Config{})
	t.Cleanup(client.Close)
	return newTestServer(t, func(cfg *Config) {
		cfg.Settings = settingsOf(c)
		for _, name := range extra {
			cfg.Settings[name] = "true"
		}
		cfg.Substituter = NewSubstituter(cfg.Store, client, cfg.Logger)
	})
}

// What clients ask is answered once the bytes are here.
func TestQueriesFetch(t *testing.T) {
	c := newFakeCache(t)
	paths := chain(t, 3)
	c.add(t, nil, paths...)
	set := nixproto.PathSet(pathsOf(paths[2:]))
	query := func(w *workerClient, substitute bool) nixproto.PathSet {
		return *w.do(t, &nixproto.QueryValidPaths{Paths: set, Substitute: substitute}, nil).(*nixproto.PathSet)
	}
	t.Run("worker", func(t *testing.T) {
		ts := fetching(t, c)
		w := ts.worker(ts.alice)
		if got := query(w, false); len(got) > 0 {
			t.Errorf("not asked for: %v", got)
		}
		if got := *w.do(t, &nixproto.QuerySubstitutablePaths{Paths: pathsOf(paths[1:])}, nil).(*nixproto.PathSet); !slices.Equal(got, nixproto.PathSet(pathsOf(paths[1:]))) {
			t.Errorf("substitutable: %v", got)
		}
		infos := *w.do(t, &nixproto.QuerySubstitutablePathInfos{Paths: map[nixproto.StorePath]string{set[0]: ""}}, nil).(*nixproto.SubstitutablePathInfos)
		if len(infos) != 1 || infos[0].Path != set[0] || infos[0].NarSize != paths[2].NarSize {
			t.Errorf("substitutable: %+v", infos)
		}
		if c.count() > 0 {
			t.Error("questions fetch")
		}
		reader := ts.worker(ts.addKey(string(StoreRead)))
		if got := query(reader, true); len(got) > 0 {
			t.Errorf("for who may only read: %v", got)
		}
		if got := query(w, true); !slices.Equal(got, set) {
			t.Errorf("valid: %v", got)
		}
		signed := paths[2]
		signed.Sign(c.key)
		checkPath(t, w, signed)
		if text := strings.Join(w.log, "\n"); !strings.Contains(text, "copying path") {
			t.Errorf("messages:\n%s", text)
		}
	})
	t.Run("ensure path", func(t *testing.T) {
		ts := fetching(t, c)
		w := ts.worker(ts.alice)
		w.do(t, &nixproto.EnsurePath{Path: set[0]}, nil)
		w.refused(t, &nixproto.EnsurePath{Path: builtPath(t, "absent", "").Path}, nil)
		if !w.isValid(t, set[0]) {
			t.Error("not valid")
		}
	})
	t.Run("serve", func(t *testing.T) {
		ts := fetching(t, c)
		sc, _ := ts.serveClient(ts.alice)
		for _, substitute := range []bool{false, true} {
			resp, err := sc.Do(&nixproto.ServeQueryValidPaths{Paths: set, Substitute: substitute}, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got := *resp.(*nixproto.PathSet); (len(got) == 1) != substitute {
				t.Errorf("substitute %v: %v", substitute, got)
			}
		}
	})
	t.Run("always", func(t *testing.T) {
		ts := fetching(t, c, "always-substitute")
		if got := query(ts.worker(ts.alice), false); !slices.Equal(got, set) {
			t.Errorf("valid: %v", got)
		}
	})
	t.Run("never", func(t *testing.T) {
		ts := fetching(t, c, "always-substitute", "never-substitute")
		if got := query(ts.worker(ts.alice), true); len(got) > 0 {
			t.Errorf("valid: %v", got)
		}
	})
}
