package store_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nbd/nixproto"
	"nbd/store"
	"nbd/store/storetest"
)

// ctx is what tests without a deadline of their own pass on.
var ctx = context.Background()

// big returns the NAR of a file of n bytes that do not repeat.
func big(seed uint64, n int) []byte {
	b := make([]byte, n)
	rng := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	rng.Read(b)
	return storetest.File(string(b), false)
}

// content reads the blob of a path.
func content(t *testing.T, s *store.Store, a store.AccountID, p nixproto.StorePath) []byte {
	t.Helper()
	info, err := s.Info(ctx, a, p)
	if err != nil {
		t.Fatal(err)
	}
	blob, err := s.OpenBlob(ctx, info.NarHash)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	var b bytes.Buffer
	if _, err := blob.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestUpload(t *testing.T) {
	s := storetest.Open(t)
	a := storetest.Account(t, s, "alice")
	tests := map[string][]byte{
		"small": storetest.File("hello", true),
		"tree":  storetest.Tree(map[string]string{"a/b/c": "x", "a/d": "->b", "e": ""}),
		"edge":  big(1, 64<<10-200),
		"file":  big(2, 64<<10),
		"large": big(3, 9<<20),
	}
	for name, nar := range tests {
		t.Run(name, func(t *testing.T) {
			info := storetest.Source(name, nar)
			info.Signatures = []string{"k:AAAA"}
			storetest.Add(t, s, a, info, nar)
			if got := content(t, s, a, info.Path); !bytes.Equal(got, nar) {
				t.Error("content is another")
			}
			got, err := s.Info(ctx, a, info.Path)
			if err != nil {
				t.Fatal(err)
			}
			if got.RegistrationTime == 0 {
				t.Error("no registration time")
			}
			got.RegistrationTime = 0
			if diff := cmp.Diff(info.Signatures, got.Signatures); diff != "" || got.CA != info.CA || got.NarHash != info.NarHash || got.NarSize != info.NarSize {
				t.Errorf("info is another: %+v", got)
			}
		})
	}
}

// TestUploadReadsNoFurther sees to it that what follows a NAR is left alone.
func TestUploadReadsNoFurther(t *testing.T) {
	s := storetest.Open(t)
	a := storetest.Account(t, s, "alice")
	one, two := storetest.File("one", false), big(7, 1<<20)
	stream := bytes.NewReader(slices.Concat(one, two, []byte("rest")))
	u, err := s.NewUpload(ctx, a, store.UploadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Abort()
	for _, nar := range [][]byte{one, two} {
		if err := u.Add(storetest.Source("n", nar), stream); err != nil {
			t.Fatal(err)
		}
	}
	if rest, _ := io.ReadAll(stream); string(rest) != "rest" {
		t.Errorf("%q is left", rest)
	}
}

// A lender is a source that lends pieces of a buffer of which it overwrites
// what it may.
type lender struct {
	bytes.Reader
	buf        []byte
	from, have int // of buf, what is not read yet
}

func (l *lender) Peek() ([]byte, error) {
	if l.from == l.have {
		n, err := l.Read(l.buf)
		if err != nil {
			return nil, err
		}
		l.from, l.have = 0, n
	}
	return l.buf[l.from:min(l.from+4321, l.have)], nil
}

func (l *lender) Discard(n int) { l.from += n }
func (l *lender) Ready() bool   { return l.from < l.have }

// TestUploadFromSource takes NARs in pieces that are gone soon after.
func TestUploadFromSource(t *testing.T) {
	s := storetest.Open(t)
	a := storetest.Account(t, s, "alice")
	for _, nar := range [][]byte{storetest.File("small", false), big(8, 20_000), big(9, 9<<20)} {
		info := storetest.Source("n", nar)
		u, err := s.NewUpload(ctx, a, store.UploadOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := u.Add(info, &lender{Reader: *bytes.NewReader(nar), buf: make([]byte, 300_000)}); err != nil {
			t.Fatal(err)
		}
		if err := u.Commit(); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(content(t, s, a, info.Path), nar) {
			t.Errorf("content of %d bytes is another", len(nar))
		}
	}
}

func TestUploadRefuses(t *testing.T) {
	file := storetest.File("hello", false)
	large := big(5, 200<<10)
	good := func(nar []byte) *nixproto.PathInfo { return storetest.Source("x", nar) }
	other := good(storetest.File("other", false))
	sum512 := nixproto.NewHasher(nixproto.SHA512)
	sum512.Write([]byte("hello"))
	flat := nixproto.ContentAddress{Method: nixproto.CAFlat, Hash: nixproto.HashFromSum(nixproto.SHA512, sum512)}
	withCA := func(ca nixproto.ContentAddress, name string, nar []byte) *nixproto.PathInfo {
		info := storetest.Unsigned("ca", name, nar)
		info.CA = ca.String()
		p, err := ca.Path(name, nil, false)
		if err != nil {
			t.Fatal(err)
		}
		info.Path = p
		return info
	}
	drv := []byte("Derive(")
	tests := []struct {
		name string
		info *nixproto.PathInfo
		nar  []byte
		want string // in the error; "" if it is accepted
	}{
		{"good", good(file), file, ""},
		{"flat", withCA(flat, "flat", file), file, ""},
		{"flat of a program", withCA(flat, "flat", storetest.File("hello", true)), storetest.File("hello", true), "not executable"},
		{"flat of other content", withCA(flat, "flat", storetest.File("hallo", false)), storetest.File("hallo", false), "content address"},
		{"truncated", good(file), file[:len(file)-8], "unexpected EOF"},
		{"truncated, size agrees", func() *nixproto.PathInfo { i := good(file); i.NarSize -= 8; return i }(), file[:len(file)-8], "ends early"},
		{"size too large", func() *nixproto.PathInfo { i := good(file); i.NarSize += 8; return i }(), append(slices.Clone(file), make([]byte, 8)...), "after its end"},
		{"size 0", func() *nixproto.PathInfo { i := good(file); i.NarSize = 0; return i }(), file, "NAR size"},
		{"size beyond files", func() *nixproto.PathInfo { i := good(file); i.NarSize = 1 << 63; return i }(), file, "NAR size"},
		{"other hash", storetest.Unsigned("s", "x", large), big(6, 200<<10), "NAR hash"},
		{"other path", func() *nixproto.PathInfo { i := good(file); i.Path = other.Path; return i }(), file, "content address"},
		{"malformed", storetest.Unsigned("s", "x", make([]byte, 200)), make([]byte, 200), "malformed"},
		{"malformed large", storetest.Unsigned("s", "x", make([]byte, 200<<10)), make([]byte, 200<<10), "malformed"},
		{"reference", storetest.Unsigned("s", "x", file, other.Path), file, "is not valid"},
		{"self reference", func() *nixproto.PathInfo {
			i := storetest.Unsigned("self", "x", file)
			i.References = []nixproto.StorePath{i.Path}
			return i
		}(), file, ""},
		{"derivation that is none", storetest.Unsigned("d", "x.drv", storetest.File(string(drv), false)), storetest.File(string(drv), false), "derivation"},
	}
	dir := t.TempDir()
	s := storetest.OpenDir(t, dir, store.Config{})
	a := storetest.Account(t, s, "alice")
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			u, err := s.NewUpload(ctx, a, store.UploadOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer u.Abort()
			err = u.Add(tt.info, bytes.NewReader(tt.nar))
			if tt.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("error %v, want one with %q", err, tt.want)
			}
			if !errors.Is(err, store.ErrInvalid) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("error %v is not ErrInvalid", err)
			}
			if err := u.Commit(); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Info(ctx, a, tt.info.Path); !errors.Is(err, store.ErrNotFound) {
				t.Errorf("path is valid: %v", err)
			}
		})
	}
	if left := files(t, filepath.Join(dir, "tmp")); len(left) > 0 {
		t.Errorf("left in tmp: %q", left)
	}
	if left := files(t, filepath.Join(dir, "blobs")); len(left) > 0 {
		t.Errorf("left in blobs: %q", left)
	}
	storetest.Check(t, s)
}

// files returns the names of all files below dir.
func files(t *testing.T, dir string) (names []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			names = append(names, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// TestTwoContents has two accounts hold different content for one path, and
// the same content under it stored once.
func TestTwoContents(t *testing.T) {
	s := storetest.Open(t)
	alice, bob, carol := storetest.Account(t, s, "alice"), storetest.Account(t, s, "bob"), storetest.Account(t, s, "carol")
	one, two := storetest.File("one", false), big(1, 100<<10)
	storetest.Add(t, s, alice, storetest.Unsigned("s", "x", one), one)
	storetest.Add(t, s, bob, storetest.Unsigned("s", "x", two), two)
	p := storetest.Unsigned("s", "x", nil).Path
	if !bytes.Equal(content(t, s, alice, p), one) || !bytes.Equal(content(t, s, bob, p), two) {
		t.Error("contents are mixed up")
	}
	if v, err := s.Valid(ctx, carol, []nixproto.StorePath{p}); err != nil || len(v) > 0 {
		t.Errorf("carol sees %v, %v", v, err)
	}
	if _, err := s.Info(ctx, carol, p); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("carol: %v", err)
	}
	storetest.Add(t, s, carol, storetest.Unsigned("s", "x", two), two)
	st, err := s.Stats(ctx)
	if err != nil || st.Blobs != 2 || st.Paths != 3 || st.Accounts != 3 {
		t.Errorf("stats %+v, %v", st, err)
	}
}

// TestFirstContentStays uploads other content for a path that is valid.
func TestFirstContentStays(t *testing.T) {
	s := storetest.Open(t)
	a := storetest.Account(t, s, "alice")
	for _, size := range []int{10, 100 << 10} {
		one, two := big(1, size), big(2, size)
		first := storetest.Unsigned("s"+string(rune(size)), "x", one)
		storetest.Add(t, s, a, first, one)

		u, err := s.NewUpload(ctx, a, store.UploadOptions{})
		if err != nil {
			t.Fatal(err)
		}
		second := *first
		second.NarHash = nixproto.SumSHA256(two)
		stream := bytes.NewReader(append(slices.Clone(two), "rest"...))
		if err := u.Add(&second, stream); err != nil || stream.Len() != 4 {
			t.Errorf("add: %v, %d bytes left", err, stream.Len())
		}
		if err := u.Add(&second, bytes.NewReader(one)); !errors.Is(err, store.ErrInvalid) {
			t.Errorf("a lie about a path that is valid: %v", err)
		}
		if err := u.Commit(); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]nixproto.StorePath{first.Path}, u.Kept()); diff != "" {
			t.Error(diff)
		}
		if !bytes.Equal(content(t, s, a, first.Path), one) {
			t.Error("content was replaced")
		}

		u, err = s.NewUpload(ctx, a, store.UploadOptions{Repair: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := u.Add(&second, bytes.NewReader(two)); err != nil {
			t.Fatal(err)
		}
		if err := u.Commit(); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(content(t, s, a, first.Path), two) {
			t.Error("content was not repaired")
		}
	}
}

// TestVerify has the caller refuse paths and change signatures.
func TestVerify(t *testing.T) {
	s := storetest.Open(t)
	a := storetest.Account(t, s, "alice")
	bad := errors.New("no signature")
	u, err := s.NewUpload(ctx, a, store.UploadOptions{Verify: func(info *nixproto.PathInfo) error {
		if info.Path.Name() == "bad" {
			return bad
		}
		info.Signatures = nil
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	nar := storetest.File("x", false)
	good := storetest.Unsigned("g", "good", nar)
	good.Signatures = []string{"k:stale"}
	if err := u.Add(storetest.Unsigned("b", "bad", nar), bytes.NewReader(nar)); !errors.Is(err, bad) {
		t.Errorf("bad: %v", err)
	}
	if err := u.Add(good, bytes.NewReader(nar)); err != nil {
		t.Fatal(err)
	}
	if err := u.Commit(); err != nil {
		t.Fatal(err)
	}
	all, err := s.All(ctx, a)
	if diff := cmp.Diff([]nixproto.StorePath{good.Path}, all); diff != "" || err != nil {
		t.Error(diff, err)
	}
	if info, err := s.Info(ctx, a, good.Path); err != nil || len(info.Signatures) > 0 {
		t.Errorf("%+v, %v", info, err)
	}
}

// TestBurst uploads paths that refer to earlier ones of the same burst, with
// files and spilled segments among them, and reads all of it back after the
// store was opened again.
func TestBurst(t *testing.T) {
	dir := t.TempDir()
	s := storetest.OpenDir(t, dir, store.Config{})
	a := storetest.Account(t, s, "alice")
	u, err := s.NewUpload(ctx, a, store.UploadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var infos []*nixproto.PathInfo
	for i := range 300 {
		nar := big(uint64(i), 1+i*300)
		var refs []nixproto.StorePath
		if i > 0 {
			refs = append(refs, infos[i-1].Path)
		}
		info := storetest.Source("p", nar, refs...)
		infos = append(infos, info)
		if err := u.Add(info, bytes.NewReader(nar)); err != nil {
			t.Fatal(err)
		}
		if i == 150 {
			if err := u.Checkpoint(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := s.Info(ctx, a, infos[200].Path); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("visible before Commit: %v", err)
	}
	if err := u.Commit(); err != nil {
		t.Fatal(err)
	}
	check := func() {
		t.Helper()
		for i, info := range infos {
			if h := sha256.Sum256(content(t, s, a, info.Path)); nixproto.NewHash(nixproto.SHA256, h[:]) != info.NarHash {
				t.Errorf("path %d has other content", i)
			}
		}
		storetest.Check(t, s)
	}
	check()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = storetest.OpenDir(t, dir, store.Config{})
	check()
}

// TestRepairCycle refuses a repair that would make two paths refer to each
// other.
func TestRepairCycle(t *testing.T) {
	s := storetest.Open(t)
	a := storetest.Account(t, s, "alice")
	nar := storetest.File("x", false)
	p := storetest.Unsigned("p", "p", nar)
	q := storetest.Unsigned("q", "q", nar, p.Path)
	storetest.Add(t, s, a, p, nar)
	storetest.Add(t, s, a, q, nar)
	u, err := s.NewUpload(ctx, a, store.UploadOptions{Repair: true})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Abort()
	if err := u.Add(storetest.Unsigned("p", "p", nar, q.Path), bytes.NewReader(nar)); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("cycle: %v", err)
	}
}

// TestRepairDamage has a repair mend blobs whose bytes are gone or wrong.
func TestRepairDamage(t *testing.T) {
	dir := t.TempDir()
	s := storetest.OpenDir(t, dir, store.Config{})
	a := storetest.Account(t, s, "alice")
	for _, nar := range [][]byte{storetest.File("small", false), big(1, 100<<10)} {
		info := storetest.Source("x", nar)
		storetest.Add(t, s, a, info, nar)
		for _, name := range append(files(t, dir+"/blobs"), files(t, dir+"/segments")...) {
			if err := os.Chmod(name, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(name, 30); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.OpenBlob(ctx, info.NarHash); !errors.Is(err, store.ErrDamaged) {
			t.Errorf("open of a damaged blob: %v", err)
		}
		if rep, err := s.Check(ctx, false); err != nil || rep.OK() {
			t.Errorf("check: %+v, %v", rep, err)
		}
		u, err := s.NewUpload(ctx, a, store.UploadOptions{Repair: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := u.Add(info, bytes.NewReader(nar)); err != nil {
			t.Fatal(err)
		}
		if err := u.Commit(); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(content(t, s, a, info.Path), nar) {
			t.Error("content is another")
		}
	}
}

// TestMemory uploads a path that is much larger than what may be allocated.
func TestMemory(t *testing.T) {
	s := storetest.Open(t)
	a := storetest.Account(t, s, "alice")
	nar := storetest.File(string(make([]byte, 96<<20)), false)
	info := storetest.Source("large", nar)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	storetest.Add(t, s, a, info, nar)
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 4<<20 {
		t.Errorf("%d bytes were allocated", n)
	}
}
