package server

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	gossh "golang.org/x/crypto/ssh"

	"nbd/nixproto"
	"nbd/nixproto/nar"
	"nbd/store"
)

// uploaded returns what a client said of a path, of what it is told now: that
// without the signatures of test accounts (TestVouch).
func uploaded(info nixproto.PathInfo) nixproto.PathInfo {
	info.Signatures = slices.DeleteFunc(slices.Clone(info.Signatures), func(sig string) bool { return strings.HasPrefix(sig, "test/") })
	return info
}

// checkPath wants a path to be valid and its NAR to be what was uploaded.
func checkPath(t *testing.T, w *workerClient, p testPath) {
	t.Helper()
	got := w.do(t, &nixproto.QueryPathInfo{Path: p.Path}, nil).(*nixproto.OptionalPathInfo).Info
	if got == nil {
		t.Errorf("%s is not valid", p.Path)
		return
	}
	opts := cmp.Options{cmpopts.EquateEmpty(), cmpopts.IgnoreFields(nixproto.PathInfo{}, "RegistrationTime"), cmp.AllowUnexported(nixproto.Hash{})}
	if diff := cmp.Diff(p.PathInfo, uploaded(*got), opts); diff != "" {
		t.Errorf("%s: %s", p.Path, diff)
	}
	w.do(t, &nixproto.NarFromPath{Path: p.Path}, nil)
	nar := make([]byte, len(p.nar))
	if _, err := io.ReadFull(w.Reader, nar); err != nil || !bytes.Equal(nar, p.nar) {
		t.Errorf("%s: another NAR, %v", p.Path, err)
	}
}

func (w *workerClient) isValid(t *testing.T, p nixproto.StorePath) bool {
	t.Helper()
	return bool(*w.do(t, &nixproto.IsValidPath{Path: p}, nil).(*nixproto.Bool))
}

func TestUploadBurst(t *testing.T) {
	ts := newTestServer(t, nil)
	w := ts.worker(ts.alice)
	w.do(t, &nixproto.AddMultipleToStore{}, burst())
	big := make([]byte, 3<<20)
	if _, err := rand.Read(big); err != nil {
		t.Fatal(err)
	}
	paths := []testPath{textPath(t, "a", "text"), builtPath(t, "big", string(big))}
	paths = append(paths, builtPath(t, "c", "refers", paths[0].Path, paths[1].Path))
	paths[2].Deriver = testDrv
	slices.Sort(paths[2].References)
	sent := slices.Clone(paths)
	sent[1].Ultimate = true // as a client says of what it built
	w.do(t, &nixproto.AddMultipleToStore{DontCheckSigs: true}, burst(sent...))
	for _, p := range paths {
		checkPath(t, w, p)
	}
	w.do(t, &nixproto.AddMultipleToStore{}, burst(paths...)) // again
	valid := w.do(t, &nixproto.QueryValidPaths{Paths: []nixproto.StorePath{paths[0].Path, testDrv}}, nil).(*nixproto.PathSet)
	if diff := cmp.Diff(nixproto.PathSet{paths[0].Path}, *valid); diff != "" {
		t.Error(diff)
	}
	part := paths[2].Path.HashPart()
	if p := w.do(t, &nixproto.QueryPathFromHashPart{HashPart: part}, nil).(*nixproto.OptionalPath); nixproto.StorePath(*p) != paths[2].Path {
		t.Errorf("path with hash part %s: %s", part, *p)
	}
	refs := w.do(t, &nixproto.QueryReferrers{Path: paths[0].Path}, nil).(*nixproto.PathSet)
	if diff := cmp.Diff(nixproto.PathSet{paths[2].Path}, *refs); diff != "" {
		t.Error(diff)
	}
	if bad := w.do(t, &nixproto.VerifyStore{CheckContents: true}, nil).(*nixproto.Bool); *bad {
		t.Errorf("the store is damaged: %q", w.log)
	}
}

// TestLyingUploads: each is refused in one sentence, leaves nothing, and the
// connection goes on.
func TestLyingUploads(t *testing.T) {
	ts := newTestServer(t, nil)
	w := ts.worker(ts.alice)
	good := builtPath(t, "good", "good")
	lies := map[string]func(p *testPath){
		"hash":         func(p *testPath) { p.NarHash = nixproto.SumSHA256(nil) },
		"small size":   func(p *testPath) { p.NarSize -= 8 },
		"large size":   func(p *testPath) { p.NarSize += 8 },
		"huge size":    func(p *testPath) { p.NarSize = 1 << 62 },
		"truncated":    func(p *testPath) { p.nar = p.nar[:len(p.nar)-16] },
		"no NAR":       func(p *testPath) { p.nar = nil },
		"junk":         func(p *testPath) { p.nar = bytes.Repeat([]byte{0xff}, len(p.nar)) },
		"padding":      func(p *testPath) { p.nar[len(p.nar)-1] = 1; p.NarHash = nixproto.SumSHA256(p.nar) },
		"trailing":     func(p *testPath) { p.nar = append(p.nar, 0, 0, 0, 0, 0, 0, 0, 0) },
		"reference":    func(p *testPath) { p.References = []nixproto.StorePath{testDrv} },
		"ca":           func(p *testPath) { p.CA = "fixed:r:" + p.NarHash.String() },
		"ca of others": func(p *testPath) { p.CA = textPath(t, "good", "other").CA },
		"ca nonsense":  func(p *testPath) { p.CA = "nonsense" },
	}
	for name, lie := range lies {
		t.Run(name, func(t *testing.T) {
			p := builtPath(t, "lie", name)
			lie(&p)
			for _, req := range []nixproto.Request{&nixproto.AddToStoreNar{Info: p.PathInfo}, &nixproto.AddMultipleToStore{}} {
				body := raw(p.nar)
				if req.Op() == nixproto.OpAddMultipleToStore {
					body = burst(good, p)
				}
				msg := w.refused(t, req, body)
				if msg == "" || strings.Contains(msg, "\n") || strings.Contains(msg, "internal") {
					t.Errorf("%s: %q", req.Op(), msg)
				}
				if w.isValid(t, p.Path) || w.isValid(t, good.Path) {
					t.Errorf("%s leaves something", req.Op())
				}
			}
		})
	}
	w.do(t, &nixproto.AddToStoreNar{Info: good.PathInfo}, raw(good.nar))
	checkPath(t, w, good)
}

// TestUploadTooLong: what comes behind the last path is an error, and nothing
// is added.
func TestUploadTooLong(t *testing.T) {
	ts := newTestServer(t, nil)
	w := ts.worker(ts.alice)
	p := builtPath(t, "p", "p")
	for name, body := range map[string]func(*nixproto.Writer) error{
		"behind the last": func(w *nixproto.Writer) error {
			return errors.Join(burst(p)(w), raw(make([]byte, 1<<20))(w))
		},
		"fewer than said": func(w *nixproto.Writer) error {
			w.Uint64(1 << 40)
			return raw([]byte("short"))(w)
		},
		"empty": func(*nixproto.Writer) error { return nil },
	} {
		msg := w.refused(t, &nixproto.AddMultipleToStore{}, body)
		if msg == "" || strings.Contains(msg, "internal") || strings.Contains(msg, "connection") {
			t.Errorf("%s: %q", name, msg)
		}
	}
	if w.isValid(t, p.Path) {
		t.Error("the path is valid")
	}
}

// TestSpoolLeavesRoom: a flat file fills the disk no further than other uploads.
func TestSpoolLeavesRoom(t *testing.T) {
	const free = 2 * spoolStride
	var file bytes.Buffer
	s := &spool{to: &file, room: func(n int64) error {
		if int64(file.Len())+n > free {
			return store.ErrNoSpace
		}
		return nil
	}}
	_, err := io.Copy(s, io.LimitReader(rand.Reader, 1<<30))
	if !errors.Is(err, store.ErrNoSpace) || file.Len() > free || file.Len() < free/2 {
		t.Errorf("%d bytes of %d are taken, %v", file.Len(), free, err)
	}
}

// TestLongBurst: a burst without end takes no memory without bound: parts of it
// become valid before the others.
func TestLongBurst(t *testing.T) {
	ts := newTestServer(t, nil)
	w := ts.worker(ts.alice)
	paths := make([]testPath, maxBurst+1)
	for i := range paths {
		paths[i] = builtPath(t, fmt.Sprint("p", i), "p")
	}
	first, last := paths[0], &paths[maxBurst]
	last.NarHash = nixproto.SumSHA256(nil) // a lie
	w.refused(t, &nixproto.AddMultipleToStore{}, burst(paths...))
	if !w.isValid(t, first.Path) || w.isValid(t, last.Path) {
		t.Error("not what came before the lie is valid")
	}
	*last = builtPath(t, "last", "p", first.Path)
	w.do(t, &nixproto.AddMultipleToStore{}, burst(paths...))
	checkPath(t, w, *last)
}

// TestUploadInterrupted: paths that came whole are kept, others are not there.
func TestUploadInterrupted(t *testing.T) {
	ts := newTestServer(t, nil)
	conn := ts.dial(ts.alice)
	p := ts.exec(conn, "nix-daemon --stdio")
	c, err := nixproto.NewClient(p, nixproto.Hello{Version: nixproto.MaxWorker}, nil)
	if err != nil {
		t.Fatal(err)
	}
	whole, part := builtPath(t, "whole", "whole"), builtPath(t, "part", strings.Repeat("x", 1<<20))
	if err := nixproto.WriteRequest(c.Writer, c.Version, &nixproto.AddMultipleToStore{}); err != nil {
		t.Fatal(err)
	}
	frames := nixproto.NewFramedWriter(c.Writer)
	var b bytes.Buffer
	w := nixproto.NewWriter(&b)
	if err := errors.Join(burst(whole, part)(w), w.Flush()); err != nil {
		t.Fatal(err)
	}
	if _, err := frames.Write(b.Bytes()[:b.Len()/2]); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(c.Writer.Flush(), p.Close()); err != nil {
		t.Fatal(err)
	}
	p.status(t)
	again := ts.worker(ts.alice)
	checkPath(t, again, whole)
	if again.isValid(t, part.Path) {
		t.Error("half a path is valid")
	}
}

func TestAddToStore(t *testing.T) {
	ts := newTestServer(t, nil)
	w := ts.worker(ts.alice)
	ref := textPath(t, "ref", "x")
	w.do(t, &nixproto.AddToStoreNar{Info: ref.PathInfo}, raw(ref.nar))
	large := strings.Repeat("0123456789", maxInMemory/4)
	for _, test := range []struct {
		method, contents string
		refs             []nixproto.StorePath
	}{
		{"text:sha256", "Derive(", []nixproto.StorePath{ref.Path}},
		{"text:sha256", "", nil},
		{"fixed:sha256", "flat", nil},
		{"fixed:sha1", large, nil},
		{"fixed:sha512", large[:maxInMemory], nil},
		{"fixed:r:sha256", "recursive", []nixproto.StorePath{ref.Path}},
		{"fixed:r:md5", large, nil},
	} {
		method, algo, err := nixproto.ParseCAMethod(test.method)
		if err != nil {
			t.Fatal(err)
		}
		archive := narOf(t, test.contents)
		body := []byte(test.contents)
		if method == nixproto.CANAR {
			body = archive
		}
		h := nixproto.NewHasher(algo)
		h.Write(body)
		ca := nixproto.ContentAddress{Method: method, Hash: nixproto.HashFromSum(algo, h)}
		path, err := ca.Path("name", test.refs, false)
		if err != nil {
			t.Fatal(err)
		}
		want := made(t, nixproto.PathInfo{Path: path, References: test.refs, CA: ca.String()}, archive)
		for range 2 {
			req := &nixproto.AddToStore{Name: "name", Method: test.method, References: test.refs}
			got := w.do(t, req, raw(body)).(*nixproto.ValidPathInfo)
			if got.Info.Path != want.Path {
				t.Errorf("%s: path %s, want %s", test.method, got.Info.Path, want.Path)
			}
		}
		checkPath(t, w, want)
	}
	for _, test := range []struct{ name, method string }{
		{"name", "fixed:git:sha1"}, {"name", "fixed:r:crc32"}, {"name", "text:sha1"}, {"name", ""}, {"..", "fixed:sha256"}, {"", "fixed:sha256"},
	} {
		w.refused(t, &nixproto.AddToStore{Name: test.name, Method: test.method}, raw(make([]byte, 100<<10)))
	}
	w.refused(t, &nixproto.AddToStore{Name: "name", Method: "fixed:r:sha256"}, raw([]byte("no NAR")))
	w.refused(t, &nixproto.AddToStore{Name: "name", Method: "fixed:r:sha256"}, raw(nil))
	w.refused(t, &nixproto.AddToStore{Name: "name", Method: "fixed:sha256", References: []nixproto.StorePath{ref.Path}}, raw(nil))
	w.refused(t, &nixproto.AddToStore{Name: "name", Method: "text:sha256", References: []nixproto.StorePath{testDrv}}, raw(nil))
}

func TestSignatures(t *testing.T) {
	trusted, err := nixproto.GenerateSigningKey("cache.example.org-1", rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other, err := nixproto.GenerateSigningKey("other-1", rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ts := newTestServer(t, func(c *Config) { c.TrustedKeys = []nixproto.PublicKey{trusted.Public()} })
	w := ts.worker(ts.alice)
	p := builtPath(t, "signed", "x")
	wrong := p
	wrong.Signatures = []string{trusted.Sign("something else")}
	if msg := w.refused(t, &nixproto.AddMultipleToStore{}, burst(wrong)); !strings.Contains(msg, "cache.example.org-1") {
		t.Errorf("wrong signature: %q", msg)
	}
	p.Sign(trusted)
	p.Sign(other)
	slices.Sort(p.Signatures)
	w.do(t, &nixproto.AddMultipleToStore{}, burst(p))
	checkPath(t, w, p)
	add := func(sigs ...string) nixproto.Request { return &nixproto.AddSignatures{Path: p.Path, Signatures: sigs} }
	third, err := nixproto.GenerateSigningKey("third-1", rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	w.do(t, add(third.Sign(p.Fingerprint())), nil)
	p.Sign(third)
	slices.Sort(p.Signatures)
	checkPath(t, w, p)
	w.refused(t, add(trusted.Sign("something else")), nil)
	w.refused(t, add("no signature"), nil)
	w.refused(t, add(ts.account.PublicKey[:strings.Index(ts.account.PublicKey, ":")]+":"+strings.Repeat("A", 86)+"=="), nil)
	checkPath(t, w, p)
}

// TestVouch: what an account brought carries its signature when it is asked
// for, over both protocols; what proves itself, and what others lend, does not.
func TestVouch(t *testing.T) {
	ts := newTestServer(t, nil)
	bobKey := newKey(t)
	bob := ts.addAccount("bob", bobKey, nil)
	own, text := builtPath(t, "own", "x"), textPath(t, "text", "x")
	ts.upload(ts.account.ID, own, text)
	ts.set(ts.account, "trusted-accounts", "bob")
	ts.set(bob, "trusted-accounts", "alice")
	key, err := nixproto.ParsePublicKey(ts.account.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // made, and remembered
		c, _ := ts.serveClient(ts.alice)
		infos := *serveDo(t, c, &nixproto.ServeQueryPathInfos{Paths: []nixproto.StorePath{own.Path}}, nil).(*nixproto.ServePathInfos)
		told := ts.worker(ts.alice).do(t, &nixproto.QueryPathInfo{Path: own.Path}, nil).(*nixproto.OptionalPathInfo).Info
		for _, info := range []nixproto.PathInfo{infos[0], *told} {
			if signers, err := info.CheckSignatures([]nixproto.PublicKey{key}); err != nil || len(signers) != 1 {
				t.Errorf("signatures %q: %v", info.Signatures, err)
			}
		}
	}
	for p, ssh := range map[nixproto.StorePath]gossh.Signer{text.Path: ts.alice, own.Path: bobKey} {
		info := ts.worker(ssh).do(t, &nixproto.QueryPathInfo{Path: p}, nil).(*nixproto.OptionalPathInfo).Info
		if info == nil || len(info.Signatures) != 0 {
			t.Errorf("%s: %+v", p, info)
		}
	}
	if stored, err := ts.store.Info(t.Context(), ts.account.ID, own.Path); err != nil || len(stored.Signatures) != 0 {
		t.Errorf("stored %+v, %v", stored, err)
	}
}

func TestCollectGarbage(t *testing.T) {
	ts := newTestServer(t, nil)
	w := ts.worker(ts.alice)
	a := textPath(t, "a", "a")
	b := builtPath(t, "b", "b", a.Path)
	w.do(t, &nixproto.AddMultipleToStore{}, burst(a, b))
	collect := func(action nixproto.GCAction, paths ...nixproto.StorePath) *nixproto.Collected {
		t.Helper()
		return w.do(t, &nixproto.CollectGarbage{Action: action, Paths: paths, MaxFreed: 1<<64 - 1}, nil).(*nixproto.Collected)
	}
	if got := collect(nixproto.GCReturnDead); len(got.Paths) != 2 {
		t.Errorf("dead: %v", got)
	}
	if got := collect(nixproto.GCReturnLive); len(got.Paths) != 0 {
		t.Errorf("live: %v", got)
	}
	msg := w.refused(t, &nixproto.CollectGarbage{Action: nixproto.GCDeleteSpecific, Paths: []nixproto.StorePath{a.Path}}, nil)
	if !strings.Contains(msg, string(a.Path)) && !strings.Contains(msg, string(b.Path)) {
		t.Errorf("delete what is referred to: %q", msg)
	}
	none := w.do(t, &nixproto.CollectGarbage{Action: nixproto.GCDeleteDead}, nil).(*nixproto.Collected)
	if len(none.Paths) != 0 {
		t.Errorf("delete nothing: %v", none)
	}
	if got := collect(nixproto.GCDeleteSpecific, b.Path); got.Freed != b.NarSize || len(got.Paths) != 1 {
		t.Errorf("delete: %v", got)
	}
	other := ts.worker(ts.alice)
	other.do(t, &nixproto.QueryValidPaths{Paths: []nixproto.StorePath{a.Path}}, nil)
	if got := collect(nixproto.GCDeleteDead); len(got.Paths) != 0 || !w.isValid(t, a.Path) {
		t.Errorf("what another session uses was deleted: %v", got)
	}
	if err := other.pipe.Close(); err != nil {
		t.Fatal(err)
	}
	other.pipe.status(t)
	if got := collect(nixproto.GCDeleteDead); len(got.Paths) != 1 || got.Paths[0] != string(a.Path) {
		t.Errorf("collect: %v", got)
	}
	if all := w.do(t, &nixproto.QueryAllValidPaths{}, nil).(*nixproto.PathSet); len(*all) != 0 {
		t.Errorf("left: %v", *all)
	}
}

// TestViews: what one account has is neither visible to another nor deleted by
// it, and the answers do not tell that it is there.
func TestViews(t *testing.T) {
	ts := newTestServer(t, nil)
	bobKey := newKey(t)
	ts.addAccount("bob", bobKey, nil)
	alice, bob := ts.worker(ts.alice), ts.worker(bobKey)
	p, absent := textPath(t, "a", "a"), textPath(t, "b", "b")
	alice.do(t, &nixproto.AddMultipleToStore{}, burst(p))
	for _, path := range []nixproto.StorePath{p.Path, absent.Path} {
		if bob.isValid(t, path) {
			t.Errorf("%s is valid for bob", path)
		}
		msg := bob.refused(t, &nixproto.NarFromPath{Path: path}, nil)
		if want := fmt.Sprintf("path '%s' is not valid", path); msg != want {
			t.Errorf("got %q, want %q", msg, want)
		}
		user := builtPath(t, "user", "x", path)
		bob.refused(t, &nixproto.AddToStoreNar{Info: user.PathInfo}, raw(user.nar))
	}
	if all := bob.do(t, &nixproto.QueryAllValidPaths{}, nil).(*nixproto.PathSet); len(*all) != 0 {
		t.Errorf("bob sees %v", *all)
	}
	bob.do(t, &nixproto.CollectGarbage{Action: nixproto.GCDeleteDead, MaxFreed: 1<<64 - 1}, nil)
	checkPath(t, alice, p)
	bob.do(t, &nixproto.AddMultipleToStore{}, burst(p))
	checkPath(t, bob, p)
}

func TestPermissions(t *testing.T) {
	ts := newTestServer(t, nil)
	p, input := textPath(t, "a", "a"), builtPath(t, "i", "i")
	ts.upload(ts.account.ID, input)
	build := &nixproto.BuildDerivation{DrvPath: testDrv, Derivation: &nixproto.Derivation{}}
	paths := &nixproto.BuildPathsWithResults{Paths: []nixproto.DerivedPath{{Path: testDrv, AllOutputs: true}}}
	opaque := &nixproto.BuildPathsWithResults{Paths: []nixproto.DerivedPath{{Path: input.Path}}}
	for _, test := range []struct {
		name    string
		key     []string
		req     nixproto.Request
		body    func(*nixproto.Writer) error
		missing string // permission
	}{
		{"query without read", []string{"build:write"}, &nixproto.IsValidPath{Path: p.Path}, nil, "store:read"},
		{"NAR without read", []string{"store:write"}, &nixproto.NarFromPath{Path: input.Path}, nil, "store:read"},
		{"upload", []string{"store:read"}, &nixproto.AddMultipleToStore{}, burst(p), "store:write"},
		{"add", []string{"store:read"}, &nixproto.AddToStore{Name: "n", Method: "fixed:sha256"}, raw(nil), "store:write"},
		{"add a NAR", []string{"store:read"}, &nixproto.AddToStoreNar{Info: p.PathInfo}, raw(p.nar), "store:write"},
		{"vouch", []string{"build:write", "store:read"}, &nixproto.AddMultipleToStore{}, burst(input), "store:write"},
		{"text for a build", []string{"build:write", "store:read"}, &nixproto.AddMultipleToStore{}, burst(p), ""},
		{"cache", []string{"store:read", "store:write"}, &nixproto.AddMultipleToStore{}, burst(input), ""},
		{"build with a cache key", []string{"store:read", "store:write"}, paths, nil, "build:write"},
		{"make a path valid", []string{"store:read"}, opaque, nil, ""},
		{"sign", []string{"store:read"}, &nixproto.AddSignatures{Path: input.Path}, nil, "store:write"},
		{"collect", []string{"store:read", "build:write"}, &nixproto.CollectGarbage{}, nil, "store:write"},
		{"log", []string{"store:read", "build:write"}, &nixproto.AddBuildLog{DrvPath: testDrv}, raw([]byte("log")), "store:write"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := ts.worker(ts.addKey(test.key...))
			if test.missing == "" {
				w.do(t, test.req, test.body)
				return
			}
			if msg := w.refused(t, test.req, test.body); !strings.Contains(msg, test.missing) || strings.Contains(msg, "\n") {
				t.Errorf("%q does not name %s", msg, test.missing)
			}
		})
	}
	w := ts.worker(ts.addKey("store:read", "store:write"))
	if r := w.do(t, build, nil).(*nixproto.BuildResult); r.Status != nixproto.MiscFailure || !strings.Contains(r.Error, "build:write") {
		t.Errorf("build with a cache key: %+v", r)
	}
}

func TestAddBuildLog(t *testing.T) {
	ts := newTestServer(t, nil)
	w := ts.worker(ts.alice)
	text := strings.Repeat("a line\n", 100_000)
	w.do(t, &nixproto.AddBuildLog{DrvPath: testDrv}, raw([]byte(text)))
	r, err := ts.store.Log(t.Context(), ts.account.ID, testDrv.Base())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || string(got) != text {
		t.Errorf("another log, %v", err)
	}
}

func TestRealisations(t *testing.T) {
	ts := newTestServer(t, nil)
	w := ts.worker(ts.alice)
	p := textPath(t, "out", "x")
	r := nixproto.Realisation{DrvHash: nixproto.SumSHA256([]byte("drv")), OutputName: "out", OutPath: p.Path,
		Dependent: map[string]string{"sha256:" + strings.Repeat("0", 64) + "!out": testDrv.Base()}}
	w.refused(t, &nixproto.RegisterDrvOutput{Realisation: r}, nil)
	w.do(t, &nixproto.AddMultipleToStore{}, burst(p))
	query := &nixproto.QueryRealisation{DrvHash: r.DrvHash, OutputName: "out"}
	if got := w.do(t, query, nil).(*nixproto.RealisationSet); len(*got) != 0 {
		t.Errorf("before: %v", *got)
	}
	w.do(t, &nixproto.RegisterDrvOutput{Realisation: r}, nil)
	got := w.do(t, query, nil).(*nixproto.RealisationSet)
	opts := cmp.Options{cmpopts.EquateEmpty(), cmp.AllowUnexported(nixproto.Hash{})}
	if diff := cmp.Diff(nixproto.RealisationSet{r}, *got, opts); diff != "" {
		t.Error(diff)
	}
}

// TestLargePath: a path much larger than any buffer goes in and out.
func TestLargePath(t *testing.T) {
	ts := newTestServer(t, nil)
	w := ts.worker(ts.alice)
	const size = 64 << 20
	var b bytes.Buffer
	nw := nar.NewWriter(&b)
	if err := nw.File("", true, size); err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(nw, rand.Reader, size); err != nil {
		t.Fatal(err)
	}
	if err := nw.Close(); err != nil {
		t.Fatal(err)
	}
	info := builtPath(t, "large", "").PathInfo
	p := made(t, nixproto.PathInfo{Path: info.Path}, b.Bytes())
	w.do(t, &nixproto.AddToStoreNar{Info: p.PathInfo}, raw(p.nar))
	checkPath(t, w, p)
}
