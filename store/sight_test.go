package store_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nbd/nixproto"
	"nbd/store"
	"nbd/store/storetest"
)

// A lending is a store with two accounts and keys, one of them public.
type lending struct {
	t                   *testing.T
	s                   *store.Store
	alice, bob          store.AccountID
	public, key, forged nixproto.SigningKey
}

func newLending(t *testing.T) *lending {
	l := &lending{t: t, public: signingKey(t, "public-1"), key: signingKey(t, "key-1"), forged: signingKey(t, "public-1")}
	l.s = storetest.OpenDir(t, t.TempDir(), store.Config{PublicKeys: []nixproto.PublicKey{l.public.Public()}})
	t.Cleanup(func() { storetest.Check(t, l.s) })
	l.alice, l.bob = storetest.Account(t, l.s, "alice"), storetest.Account(t, l.s, "bob")
	return l
}

func signingKey(t testing.TB, name string) nixproto.SigningKey {
	t.Helper()
	k, err := nixproto.GenerateSigningKey(name, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// add brings a path with that content into a view, signed by keys.
func (l *lending) add(a store.AccountID, name, content string, keys []nixproto.SigningKey, refs ...nixproto.StorePath) *nixproto.PathInfo {
	l.t.Helper()
	nar := storetest.File(content, false)
	info := storetest.Unsigned(name, name, nar, refs...)
	for _, k := range keys {
		info.Sign(k)
	}
	storetest.Add(l.t, l.s, a, info, nar)
	return info
}

// linked is the trust of an account that is linked with others.
func linked(others ...store.AccountID) store.Trust { return store.Trust{Linked: others} }

// sight returns what an account may use, with its choices held until the test
// ends.
func (l *lending) sight(a store.AccountID, t store.Trust) *store.Sight {
	v := l.s.NewSight(a, t)
	lease := v.NewLease()
	l.t.Cleanup(lease.Release)
	return v
}

// sees wants a path to be seen with that content, or, if info is nil, not at
// all, by all that asks.
func (l *lending) sees(what string, v *store.Sight, p nixproto.StorePath, info *nixproto.PathInfo) {
	l.t.Helper()
	got, err := v.Info(ctx, p)
	if info == nil && !errors.Is(err, store.ErrNotFound) {
		l.t.Errorf("%s: sees %+v, %v", what, got, err)
	}
	if info != nil && (err != nil || got.NarHash != info.NarHash || !slices.Equal(got.References, info.References)) {
		l.t.Errorf("%s: sees %+v, %v", what, got, err)
	}
	valid, err := v.Valid(ctx, []nixproto.StorePath{p})
	if err != nil || len(valid) == 1 != (info != nil) {
		l.t.Errorf("%s: valid %q, %v", what, valid, err)
	}
	if by, err := v.ByHashPart(ctx, p.HashPart()); err == nil != (info != nil) || info != nil && by != p {
		l.t.Errorf("%s: by hash part %q, %v", what, by, err)
	}
	if closure, err := v.Closure(ctx, []nixproto.StorePath{p}); err == nil != (info != nil) || info != nil && !slices.Contains(closure, p) {
		l.t.Errorf("%s: closure %q, %v", what, closure, err)
	}
	if refs, err := v.Referrers(ctx, p); err == nil != (info != nil) {
		l.t.Errorf("%s: referrers %q, %v", what, refs, err)
	}
	if _, _, err := v.InputRoots(ctx, []nixproto.StorePath{p}); err == nil != (info != nil) {
		l.t.Errorf("%s: input roots %v", what, err)
	}
}

func TestLinked(t *testing.T) {
	l := newLending(t)
	dep := l.add(l.alice, "dep", "alice's", nil)
	top := l.add(l.alice, "top", "top", nil, dep.Path)
	l.sees("a stranger", l.sight(l.bob, store.Trust{}), top.Path, nil)
	bob := l.sight(l.bob, linked(l.alice))
	l.sees("bob", bob, top.Path, top)
	l.sees("bob", bob, dep.Path, dep)
	refs, err := bob.Referrers(ctx, dep.Path)
	if diff := cmp.Diff([]nixproto.StorePath{top.Path}, refs); diff != "" || err != nil {
		t.Error(diff, err)
	}
	bobs := l.add(l.bob, "bobs", "b", nil)
	l.sees("alice", l.sight(l.alice, linked(l.bob)), bobs.Path, bobs)
	// What bob borrows from alice is not lent on to carol.
	carol := storetest.Account(t, l.s, "carol")
	l.sees("carol", l.sight(carol, linked(l.bob)), top.Path, nil)
	// The own view goes first, whenever it comes.
	mine := l.add(l.bob, "dep", "bob's", nil)
	l.sees("bob, with a dep of his own", bob, dep.Path, mine)
	closure, err := bob.ClosureInfo(ctx, []nixproto.StorePath{top.Path})
	if err != nil || len(closure) != 2 || closure[0].NarHash != mine.NarHash {
		t.Errorf("closure %+v, %v", closure, err)
	}
	if all, err := l.s.All(ctx, l.bob); err != nil || len(all) != 2 {
		t.Errorf("bob's own paths: %q, %v", all, err)
	}
}

// info returns what a view has for a path made by add.
func (l *lending) info(a store.AccountID, name string) *nixproto.PathInfo {
	l.t.Helper()
	info, err := l.s.Info(ctx, a, storetest.Unsigned(name, name, nil).Path)
	if err != nil {
		l.t.Fatal(err)
	}
	return info
}

func TestSigned(t *testing.T) {
	l := newLending(t)
	pub, key := l.public.Public(), l.key.Public()
	keys := func(k ...nixproto.PublicKey) []nixproto.PublicKey { return k }
	offer := func(k ...nixproto.PublicKey) []store.Offer { return []store.Offer{{Account: l.alice, Keys: k}} }
	sign := func(k ...nixproto.SigningKey) []nixproto.SigningKey { return k }

	plain := l.add(l.alice, "plain", "x", nil)
	signed := l.add(l.alice, "signed", "x", sign(l.key))
	public := l.add(l.alice, "public", "x", sign(l.public, l.key))
	onPlain := l.add(l.alice, "on-plain", "x", sign(l.public, l.key), plain.Path)
	onPublic := l.add(l.alice, "on-public", "x", sign(l.public), public.Path)
	forged := l.add(l.alice, "forged", "x", sign(l.forged))

	// A signature of other content, and one of other references.
	stale := func(name, content string, refs ...nixproto.StorePath) *nixproto.PathInfo {
		good := storetest.Unsigned(name, name, storetest.File("x", false))
		good.Sign(l.public)
		nar := storetest.File(content, false)
		bad := storetest.Unsigned(name, name, nar, refs...)
		bad.Signatures = good.Signatures
		storetest.Add(t, l.s, l.alice, bad, nar)
		return bad
	}
	tampered, edge := stale("tampered", "y"), stale("edge", "x", public.Path)

	tests := []struct {
		name  string
		trust store.Trust
		path  *nixproto.PathInfo
		seen  bool
	}{
		{"no trust", store.Trust{}, public, false},
		{"public key", store.Trust{Keys: keys(pub)}, public, true},
		{"public key, with closure", store.Trust{Keys: keys(pub)}, onPublic, true},
		{"public key, but not all of the closure", store.Trust{Keys: keys(pub)}, onPlain, false},
		{"public key, unsigned", store.Trust{Keys: keys(pub)}, plain, false},
		{"forged signature", store.Trust{Keys: keys(pub)}, forged, false},
		{"signature of other content", store.Trust{Keys: keys(pub)}, tampered, false},
		{"signature of other references", store.Trust{Keys: keys(pub)}, edge, false},
		{"a key of the public key's name", store.Trust{Keys: keys(l.forged.Public())}, forged, false},
		{"trusted key without offer", store.Trust{Keys: keys(key)}, signed, false},
		{"offer without trusted key", store.Trust{Offers: offer(key)}, signed, false},
		{"offer of another key", store.Trust{Keys: keys(key, pub), Offers: offer(pub)}, signed, false},
		{"offer and trusted key", store.Trust{Keys: keys(key), Offers: offer(key)}, signed, true},
		{"offer of what is not signed", store.Trust{Keys: keys(key), Offers: offer(key)}, plain, false},
		{"offer, but not all of the closure", store.Trust{Keys: keys(key), Offers: offer(key)}, onPlain, false},
	}
	check := func(when string) {
		for _, tt := range tests {
			want := tt.path
			if !tt.seen {
				want = nil
			}
			l.sees(when+tt.name, l.sight(l.bob, tt.trust), tt.path.Path, want)
		}
	}
	check("pending: ")
	if _, err := l.s.All(ctx, l.alice); err != nil { // flushes
		t.Fatal(err)
	}
	check("flushed: ")

	// What is missing in the closure may come from elsewhere.
	mine := l.add(l.bob, "plain", "bob's", nil)
	bob := l.sight(l.bob, store.Trust{Keys: keys(pub)})
	l.sees("with what bob has", bob, onPlain.Path, onPlain)
	closure, err := bob.ClosureInfo(ctx, []nixproto.StorePath{onPlain.Path})
	if err != nil || len(closure) != 2 || closure[0].NarHash != mine.NarHash {
		t.Errorf("closure %+v, %v", closure, err)
	}
	// Only signatures that count are told, and nothing else of alice's view.
	got, err := bob.Info(ctx, public.Path)
	if err != nil || !slices.Equal(got.Signatures, []string{l.public.Sign(public.Fingerprint())}) || got.RegistrationTime != 0 || got.Deriver != "" {
		t.Errorf("%+v, %v", got, err)
	}
}

// Two paths that a trusted key signed, which refer to each other.
func TestSignedCircle(t *testing.T) {
	l := newLending(t)
	carol := storetest.Account(t, l.s, "carol")
	sign := []nixproto.SigningKey{l.public}
	a, b := storetest.Unsigned("a", "a", nil).Path, storetest.Unsigned("b", "b", nil).Path
	l.add(l.alice, "b", "b", nil)
	l.add(l.alice, "a", "a", sign, b)
	l.add(carol, "a", "a", nil)
	l.add(carol, "b", "b", sign, a)
	bob := l.sight(l.bob, store.Trust{Keys: []nixproto.PublicKey{l.public.Public()}})
	l.sees("circle", bob, a, nil)
	l.sees("circle", bob, b, nil)
}

// The index follows the operator's list of public keys.
func TestPublicKeysChange(t *testing.T) {
	dir := t.TempDir()
	one, two := signingKey(t, "one-1"), signingKey(t, "two-1")
	open := func(keys ...nixproto.PublicKey) *store.Store {
		s, err := store.Open(dir, store.Config{PublicKeys: keys})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	l := &lending{t: t, s: s, alice: storetest.Account(t, s, "alice"), bob: storetest.Account(t, s, "bob")}
	path := l.add(l.alice, "x", "x", []nixproto.SigningKey{one, two})
	more := l.add(l.alice, "y", "y", nil)
	trust := store.Trust{Keys: []nixproto.PublicKey{one.Public()}}
	for i, step := range []struct {
		keys []nixproto.PublicKey
		seen *nixproto.PathInfo
	}{
		{nil, nil}, {[]nixproto.PublicKey{one.Public()}, path}, {[]nixproto.PublicKey{two.Public()}, nil},
		{[]nixproto.PublicKey{two.Public(), one.Public()}, path},
	} {
		if err := l.s.Close(); err != nil {
			t.Fatal(err)
		}
		l.s = open(step.keys...)
		l.sees(fmt.Sprint("step ", i), l.s.NewSight(l.bob, trust), path.Path, step.seen)
		storetest.Check(t, l.s)
	}
	// A signature that is added later counts.
	l.sees("not signed", l.s.NewSight(l.bob, trust), more.Path, nil)
	if err := l.s.AddSignatures(ctx, l.alice, more.Path, []string{one.Sign(more.Fingerprint())}); err != nil {
		t.Fatal(err)
	}
	l.sees("signed later", l.s.NewSight(l.bob, trust), more.Path, more)
	if _, err := l.s.Delete(ctx, l.alice, more.Path); err != nil {
		t.Fatal(err)
	}
	l.sees("deleted", l.s.NewSight(l.bob, trust), more.Path, nil)
	if err := l.s.RemoveAccount(ctx, l.alice); err != nil {
		t.Fatal(err)
	}
	l.sees("removed", l.s.NewSight(l.bob, trust), path.Path, nil)
	storetest.Check(t, l.s)
	if err := l.s.Close(); err != nil {
		t.Fatal(err)
	}
}

// What was chosen stays, with its bytes, until the lease ends; but not beyond
// the end of its account.
func TestChoiceIsKept(t *testing.T) {
	l := newLending(t)
	dep := l.add(l.alice, "dep", "dep", nil)
	top := l.add(l.alice, "top", "alice's", nil, dep.Path)
	v := l.s.NewSight(l.bob, linked(l.alice))
	lease := v.NewLease()
	l.sees("bob", v, top.Path, top)
	if _, err := l.s.Delete(ctx, l.alice, top.Path, dep.Path); err != nil {
		t.Errorf("the lender is kept from deleting: %v", err)
	}
	sweep := func() {
		t.Helper()
		if _, err := l.s.Sweep(ctx); err != nil {
			t.Fatal(err)
		}
	}
	sweep()
	other := l.add(l.alice, "top", "another one", nil)
	l.sees("bob's session", v, top.Path, top)
	for _, info := range []*nixproto.PathInfo{top, dep} {
		if ok, err := l.s.HasBlob(ctx, info.NarHash); !ok || err != nil {
			t.Errorf("bytes of %s: %v, %v", info.Path, ok, err)
		}
	}
	second := v.NewLease()
	lease.Release()
	lease.Release()
	l.sees("with a lease left", v, top.Path, top)
	second.Release()
	l.sees("later", l.s.NewSight(l.bob, linked(l.alice)), top.Path, other)
	l.sees("the same Sight, later", v, top.Path, other)
	sweep()
	if ok, err := l.s.HasBlob(ctx, top.NarHash); ok || err != nil {
		t.Errorf("bytes that nobody has: %v, %v", ok, err)
	}

	held := l.sight(l.bob, linked(l.alice))
	l.sees("before the removal", held, top.Path, other)
	if err := l.s.RemoveAccount(ctx, l.alice); err != nil {
		t.Fatal(err)
	}
	l.sees("after the removal", held, top.Path, nil)
}

// The lender's own leases and the borrower's do not meet; own paths that lent
// ones refer to stay.
func TestBorrowerKeepsOwnReferences(t *testing.T) {
	l := newLending(t)
	dep := l.add(l.alice, "dep", "dep", nil)
	top := l.add(l.alice, "top", "top", nil, dep.Path)
	mine := l.add(l.bob, "dep", "mine", nil)
	v := l.s.NewSight(l.bob, linked(l.alice))
	lease := v.NewLease()
	l.sees("bob", v, top.Path, top)
	if _, err := l.s.Delete(ctx, l.bob, mine.Path); !errors.Is(err, store.ErrInUse) {
		t.Errorf("delete what a lent path refers to: %v", err)
	}
	lease.Release()
	if _, err := l.s.Delete(ctx, l.bob, mine.Path); err != nil {
		t.Error(err)
	}
	l.sees("bob", l.sight(l.bob, linked(l.alice)), dep.Path, dep)
}

// ownPaths wants an account's own view to be these paths.
func (l *lending) ownPaths(what string, a store.AccountID, want ...nixproto.StorePath) {
	l.t.Helper()
	all, err := l.s.All(ctx, a)
	slices.Sort(want)
	if diff := cmp.Diff(want, all); diff != "" || err != nil {
		l.t.Errorf("%s: %s %v", what, diff, err)
	}
}

func TestAdoptByUpload(t *testing.T) {
	l := newLending(t)
	base := l.add(l.alice, "base", "base", nil)
	dep := l.add(l.alice, "dep", "dep", nil, base.Path)
	l.add(l.alice, "other", "other", nil)
	bob := l.sight(l.bob, linked(l.alice))

	nar := storetest.File("bob's", false)
	mine := storetest.Unsigned("mine", "mine", nar, dep.Path)
	upload := func(v *store.Sight, info *nixproto.PathInfo, nar []byte, opts store.UploadOptions) error {
		u, err := v.NewUpload(ctx, opts)
		if err != nil {
			t.Fatal(err)
		}
		defer u.Abort()
		if err := u.Add(info, bytes.NewReader(nar)); err != nil {
			return errors.Join(err, u.Commit())
		}
		return u.Commit()
	}
	if err := upload(l.s.NewSight(l.bob, store.Trust{}), mine, nar, store.UploadOptions{}); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("without a link: %v", err)
	}
	wrong := *mine
	wrong.NarHash = nixproto.SumSHA256(nil)
	if err := upload(bob, &wrong, nar, store.UploadOptions{}); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("wrong hash: %v", err)
	}
	l.ownPaths("after failures", l.bob)
	if err := upload(bob, mine, nar, store.UploadOptions{}); err != nil {
		t.Fatal(err)
	}
	l.ownPaths("adopted", l.bob, base.Path, dep.Path, mine.Path)
	if got := l.info(l.bob, "dep"); got.NarHash != dep.NarHash || got.RegistrationTime == 0 {
		t.Errorf("adopted %+v", got)
	}
	// It is bob's own now, whatever alice does.
	if err := l.s.RemoveAccount(ctx, l.alice); err != nil {
		t.Fatal(err)
	}
	if _, err := l.s.Sweep(ctx); err != nil {
		t.Fatal(err)
	}
	if got := content(t, l.s, l.bob, base.Path); !bytes.Equal(got, storetest.File("base", false)) {
		t.Error("content of an adopted path is another")
	}
	if err := upload(bob, mine, nar, store.UploadOptions{Repair: true}); err != nil {
		t.Error(err)
	}
}

// A path that is not taken brings nothing along.
func TestAdoptNothingForKept(t *testing.T) {
	l := newLending(t)
	dep := l.add(l.alice, "dep", "dep", nil)
	mine := l.add(l.bob, "mine", "as it was", nil)
	u, err := l.sight(l.bob, linked(l.alice)).NewUpload(ctx, store.UploadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	nar := storetest.File("as it is not", false)
	on := storetest.File("on", false)
	if err := u.Add(storetest.Unsigned("mine", "mine", nar, dep.Path), bytes.NewReader(nar)); err != nil {
		t.Fatal(err)
	}
	// Its closure hash is not that of what was just added.
	if err := u.Add(storetest.Unsigned("on", "on", on, mine.Path), bytes.NewReader(on)); err != nil {
		t.Fatal(err)
	}
	if err := u.Commit(); err != nil {
		t.Fatal(err)
	}
	l.ownPaths("kept", l.bob, mine.Path, storetest.Unsigned("on", "on", nil).Path)
	l.checkRoots(l.sight(l.bob, store.Trust{}), storetest.Unsigned("on", "on", nil).Path)
}

func TestAdoptByRegister(t *testing.T) {
	l := newLending(t)
	base := l.add(l.alice, "base", "base", nil)
	dep := l.add(l.alice, "dep", "dep", nil, base.Path)
	stage := func(content string) *store.Staged {
		st, err := l.s.Stage(ctx, l.bob)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := st.Write(storetest.File(content, false)); err != nil {
			t.Fatal(err)
		}
		if err := st.Finish(); err != nil {
			t.Fatal(err)
		}
		return st
	}
	one := storetest.Unsigned("one", "one", nil, dep.Path)
	two := storetest.Unsigned("two", "two", nil, one.Path, base.Path)
	bob := l.sight(l.bob, linked(l.alice))
	if err := bob.Register(ctx, []store.Registration{{Info: *one, Staged: stage("1")}, {Info: *two, Staged: stage("2")}}); err != nil {
		t.Fatal(err)
	}
	l.ownPaths("registered", l.bob, base.Path, dep.Path, one.Path, two.Path)
	l.checkRoots(l.sight(l.bob, store.Trust{}), two.Path, dep.Path)

	// A path that what is lent refers to, and that would refer to it.
	low := l.add(l.alice, "low", "low", nil)
	high := l.add(l.alice, "high", "high", nil, low.Path)
	circle := storetest.Unsigned("low", "low", nil, high.Path)
	if err := bob.Register(ctx, []store.Registration{{Info: *circle, Staged: stage("3")}}); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("circle: %v", err)
	}
	u, err := bob.NewUpload(ctx, store.UploadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Abort()
	nar := storetest.File("4", false)
	if err := u.Add(storetest.Unsigned("low", "low", nar, high.Path), bytes.NewReader(nar)); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("circle: %v", err)
	}
}

// A lender's realisation counts with the lender's content alone.
func TestLentRealisation(t *testing.T) {
	l := newLending(t)
	out := l.add(l.alice, "out", "alice's", []nixproto.SigningKey{l.key})
	real := &nixproto.Realisation{DrvHash: nixproto.SumSHA256([]byte("drv")), OutputName: "out", OutPath: out.Path}
	if err := l.s.AddRealisation(ctx, l.alice, real); err != nil {
		t.Fatal(err)
	}
	ask := func(what string, v *store.Sight, seen bool) {
		t.Helper()
		got, err := v.Realisation(ctx, real.DrvHash, "out")
		if seen && (err != nil || got.OutPath != out.Path) || !seen && !errors.Is(err, store.ErrNotFound) {
			t.Errorf("%s: %+v, %v", what, got, err)
		}
	}
	offered := store.Trust{Keys: []nixproto.PublicKey{l.key.Public()}, Offers: []store.Offer{{Account: l.alice, Keys: []nixproto.PublicKey{l.key.Public()}}}}
	ask("stranger", l.sight(l.bob, store.Trust{}), false)
	ask("linked", l.sight(l.bob, linked(l.alice)), true)
	ask("offered, not signed", l.sight(l.bob, offered), false)
	real.Sign(l.key)
	if err := l.s.AddRealisation(ctx, l.alice, real); err != nil {
		t.Fatal(err)
	}
	ask("offered, signed", l.sight(l.bob, offered), true)
	l.add(l.bob, "out", "bob's", nil)
	ask("other content", l.sight(l.bob, linked(l.alice)), false)
}

// checkRoots compares InputRoots with what the records say.
func (l *lending) checkRoots(v *store.Sight, inputs ...nixproto.StorePath) {
	l.t.Helper()
	closure, err := v.ClosureInfo(ctx, inputs)
	if err != nil {
		l.t.Fatal(err)
	}
	sums := make(map[nixproto.StorePath]nixproto.ClosureHash)
	referred := make(map[nixproto.StorePath]bool)
	for _, info := range closure {
		for _, ref := range info.References {
			referred[ref] = referred[ref] || ref != info.Path
		}
		sums[info.Path], err = info.HashClosure(func(p nixproto.StorePath) (nixproto.ClosureHash, bool) {
			h, ok := sums[p]
			return h, ok
		})
		if err != nil {
			l.t.Fatal(err)
		}
	}
	var want []nixproto.StorePath
	var hashes []nixproto.ClosureHash
	for _, info := range closure {
		if !referred[info.Path] {
			want = append(want, info.Path)
		}
	}
	slices.Sort(want)
	for _, p := range want {
		hashes = append(hashes, sums[p])
	}
	roots, got, err := v.InputRoots(ctx, inputs)
	if diff := cmp.Diff(want, roots) + cmp.Diff(hashes, got); diff != "" || err != nil {
		l.t.Errorf("roots of %q: %s %v", inputs, diff, err)
	}
}

// A closure hash follows the content of every path of the closure.
func TestClosureHashes(t *testing.T) {
	l := newLending(t)
	base := l.add(l.alice, "base", "base", nil)
	mid := l.add(l.alice, "mid", "mid", nil, base.Path)
	top := l.add(l.alice, "top", "top", nil, mid.Path)
	alice := l.sight(l.alice, store.Trust{})
	check := func() {
		t.Helper()
		l.checkRoots(alice, top.Path)
		l.checkRoots(alice, base.Path, mid.Path)
		l.checkRoots(alice, base.Path, mid.Path, top.Path)
	}
	check()
	repair := func(content string) {
		t.Helper()
		nar := storetest.File(content, false)
		u, err := l.s.NewUpload(ctx, l.alice, store.UploadOptions{Repair: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := u.Add(storetest.Unsigned("base", "base", nar), bytes.NewReader(nar)); err != nil {
			t.Fatal(err)
		}
		if err := u.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	repair("repaired while it is pending")
	check()
	if _, err := l.s.All(ctx, l.alice); err != nil { // flushes
		t.Fatal(err)
	}
	check()
	repair("repaired again")
	check()
	l.add(l.alice, "more", "more", nil, top.Path)
	l.checkRoots(alice, storetest.Unsigned("more", "more", nil).Path)
	storetest.Check(t, l.s)
	// As bob sees it, with a base of his own below alice's.
	l.add(l.bob, "base", "bob's", nil)
	l.checkRoots(l.sight(l.bob, linked(l.alice)), top.Path, base.Path)
	// Many that are not known are computed and kept.
	infos := storetest.Fill(t, l.s, l.alice, 200)
	repair("once more")
	last := infos[len(infos)-1].Path
	for range 3 {
		l.checkRoots(alice, last, infos[50].Path)
	}
}

// Deletion and commits go on at the same time, and none sees a path without
// what it refers to.
func TestDeleteAmongUploads(t *testing.T) {
	l := newLending(t)
	stop := time.Now().Add(time.Second)
	done := make(chan error, 1)
	go func() {
		var err error
		for i := 0; time.Now().Before(stop) && err == nil; i++ {
			for _, name := range []string{"top", "dep"} {
				_, err = l.s.Delete(ctx, l.alice, storetest.Unsigned(name, name, nil).Path)
				if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrInUse) {
					err = nil
				}
			}
		}
		done <- err
	}()
	for time.Now().Before(stop) {
		nar := storetest.File("x", false)
		dep := storetest.Unsigned("dep", "dep", nar)
		storetest.Add(t, l.s, l.alice, dep, nar)
		u, err := l.s.NewUpload(ctx, l.alice, store.UploadOptions{})
		if err != nil {
			t.Fatal(err)
		}
		err = u.Add(storetest.Unsigned("top", "top", nar, dep.Path), bytes.NewReader(nar))
		if err == nil {
			err = u.Commit()
		}
		u.Abort()
		if err != nil && !errors.Is(err, store.ErrInvalid) { // dep was deleted
			t.Fatal(err)
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Whatever the lender does meanwhile, what a session was told is there can be
// read, and stays the same.
func TestBorrowAmongDeletions(t *testing.T) {
	l := newLending(t)
	stop := time.Now().Add(time.Second)
	errs := make(chan error, 2)
	path := func(name string) nixproto.StorePath { return storetest.Unsigned(name, name, nil).Path }
	go func() {
		var err error
		for i := 0; time.Now().Before(stop) && err == nil; i++ {
			if _, err = l.s.Delete(ctx, l.alice, path("top"), path("dep")); err == nil || errors.Is(err, store.ErrNotFound) {
				l.add(l.alice, "dep", fmt.Sprintf("%*d", 70000*(i%2), i), nil)
				l.add(l.alice, "top", fmt.Sprint(i), []nixproto.SigningKey{l.public}, path("dep"))
				err = nil
			}
		}
		errs <- err
	}()
	go func() {
		var err error
		for time.Now().Before(stop) && err == nil {
			_, err = l.s.Sweep(ctx)
		}
		errs <- err
	}()
	borrow := func() error {
		v := l.s.NewSight(l.bob, linked(l.alice))
		lease := v.NewLease()
		defer lease.Release()
		infos, err := v.ClosureInfo(ctx, []nixproto.StorePath{path("top")})
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		for range 3 {
			for _, info := range infos {
				now, err := v.Info(ctx, info.Path)
				if err != nil || now.NarHash != info.NarHash {
					return fmt.Errorf("%s was %s, now %v, %v", info.Path, info.NarHash, now, err)
				}
				blob, err := l.s.OpenBlob(ctx, info.NarHash)
				if err != nil {
					return err
				}
				if err := blob.Close(); err != nil {
					return err
				}
			}
		}
		return err
	}
	for time.Now().Before(stop) {
		if err := borrow(); err != nil {
			t.Error(err)
			break
		}
	}
	for range 2 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}
