package server

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"nbd/nixproto"
	"nbd/store"
	"nbd/store/storetest"
	"nbd/vm"
)

var (
	modelSeed  = flag.Uint64("model.seed", 0, "run TestModel with this seed alone")
	modelSeeds = flag.Int("model.seeds", 5, "how many seeds TestModel runs with")
	modelSteps = flag.Int("model.steps", 120, "steps of TestModel with each seed")
)

// TestModel lets accounts change their settings, upload, sign, delete, build,
// leave and vanish at random, and the server restart and crash, and compares
// each answer and each view with the rules (rules_test.go).
func TestModel(t *testing.T) {
	warmUp(t)
	if *modelSeed != 0 {
		synctest.Test(t, func(t *testing.T) { runModel(t, *modelSeed) })
		return
	}
	for seed := range uint64(*modelSeeds) {
		t.Run(fmt.Sprint(seed+1), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { runModel(t, seed+1) })
		})
	}
}

// warmUp makes what a process makes once: outside the bubbles in which the clock
// of a model jumps, or nobody else could use it.
func warmUp(t *testing.T) {
	bt := newBuildTest(t, nil)
	bt.alice().build(random(bt))
	s := bt.newSession(bt.account)
	defer s.leases.Release()
	if _, err := bt.Restart(t.Context(), s, bt.alice().runs()[0].ID); err != nil {
		t.Fatal(err)
	}
	bt.kept.Wait()
}

func runModel(t *testing.T, seed uint64) {
	m := newModelTest(t, seed)
	defer m.close()
	often := []func(){m.ask, m.ask, m.ask, m.together, m.together, m.upload, m.upload, m.delete, m.delete, m.wish, m.wish, m.sign}
	rare := []func(){m.sweep, m.restart, m.removeAccount, m.newGeneration, m.revoke}
	for step := range *modelSteps {
		m.step = step
		if m.rng.IntN(10) > 0 {
			often[m.rng.IntN(len(often))]()
		} else {
			rare[m.rng.IntN(len(rare))]()
		}
		m.compare()
		if t.Failed() {
			t.Fatalf("seed %d, step %d; to see it again: -run TestModel -model.seed %d", seed, step, seed)
		}
	}
	storetest.Check(t, m.st)
	t.Logf("answers: %v", m.answers)
}

// publicKeyName is the key of which the operator says that it is public.
const publicKeyName = "public-1"

// A modelTest drives a real Builds over a real store, and a world beside it.
type modelTest struct {
	*buildTest
	world
	t       *testing.T
	rng     *rand.Rand
	step    int
	trusts  *trusts
	names   int
	answers map[string]int           // by check
	texts   int                      // that were made up so far
	made    map[nixproto.Hash]string // by the hash of the NAR
	inputs  []nixproto.StorePath
	drvs    []*modelDrv
	foreign map[string]nixproto.SigningKey

	mu      sync.Mutex // guards what follows: what runs
	scripts map[context.Context]*script
	next    *script // of the flight that is about to start; nil if none may
	runs    int
}

func newModelTest(t *testing.T, seed uint64) *modelTest {
	m := &modelTest{t: t, rng: rand.New(rand.NewPCG(seed, 0)), foreign: map[string]nixproto.SigningKey{}, made: map[nixproto.Hash]string{}, answers: map[string]int{}, scripts: map[context.Context]*script{}}
	m.world = world{members: map[store.AccountID]*member{}, ends: map[slot]*knownEnds{},
		bytes: map[nixproto.Hash]bool{}, generation: "fake 1", emulated: m.chance(2)}
	for _, name := range []string{publicKeyName, "other-1"} {
		m.foreign[name] = testSigningKey(t, name)
	}
	for i := range 4 {
		m.inputs = append(m.inputs, storetest.Unsigned(fmt.Sprint(i), "in", nil).Path)
	}
	m.buildTest = &buildTest{t: t, dir: t.TempDir()}
	m.addDrv("a", false, []string{"out"}, m.inputs[0])
	m.addDrv("b", false, []string{"out", "dev"}, m.inputs[1], m.inputs[2])
	m.addDrv("c", false, []string{"out"}, m.drvs[0].outs["out"], m.inputs[3])
	m.addDrv("f", true, []string{"out"}, m.inputs[1])
	m.open(m.dir)
	for range 4 {
		m.addAccount()
	}
	return m
}

// rightText is what the fixed output has to be.
const rightText = "what is fetched"

func (m *modelTest) addDrv(name string, fixed bool, outputs []string, inputs ...nixproto.StorePath) {
	m.t.Helper()
	d := drv(name, outputs...)
	if fixed {
		d = fixedDrv(m.t, name, "sha256", nixproto.SumSHA256([]byte(rightText)))
	}
	d.InputSrcs = slices.Sorted(slices.Values(inputs))
	if !fixed {
		paths, _, err := nixproto.NewModulo(nil).OutputPaths(d)
		if err != nil {
			m.t.Fatal(err)
		}
		for o, p := range paths {
			d.Outputs[o] = nixproto.DerivationOutput{Path: p}
			d.Env[o] = string(p)
		}
	}
	path, err := d.DrvPath()
	if err != nil {
		m.t.Fatal(err)
	}
	md := &modelDrv{drv: d, path: path, inputs: d.InputSrcs, outs: map[string]nixproto.StorePath{}, fixed: fixed}
	for o, out := range d.Outputs {
		md.outs[o] = out.Path
	}
	m.drvs = append(m.drvs, md)
}

// open starts a server on a state directory.
func (m *modelTest) open(dir string) {
	m.t.Helper()
	st, err := store.Open(dir, store.Config{ServerName: "test", MinFree: -1, PublicKeys: []nixproto.PublicKey{m.foreign[publicKeyName].Public()}})
	if err != nil {
		m.t.Fatal(err)
	}
	r := &fakeRunner{acts: map[string]func(*fakeRun) error{}, runs: map[string]int{}, generation: m.generation, status: vm.Status{Accel: "kvm"}}
	if m.emulated {
		r.status.Accel = "tcg"
	}
	for _, d := range m.drvs {
		r.acts[d.drv.Name] = m.run
	}
	m.dir, m.st, m.runner = dir, st, r
	m.Builds, err = NewBuilds(context.Background(), BuildsConfig{Store: st, Runner: r, Room: Room{Guests: 20, MemoryMiB: 1 << 20, CPUs: 1000}, MemoryMiB: 1000, MaxMemoryMiB: 2000, ScratchMiB: 1024, MaxScratchMiB: 1024})
	if err != nil {
		m.t.Fatal(err)
	}
	m.book = newSettingsBook(nil, st, slog.New(slog.DiscardHandler))
	m.trusts = &trusts{book: m.book}
}

func (m *modelTest) close() {
	m.Builds.Close()
	if err := m.st.Close(); err != nil {
		m.t.Error(err)
	}
}

func (m *modelTest) chance(n int) bool { return m.rng.IntN(n) == 0 }

func oneOf[T any](m *modelTest, list []T) T { return list[m.rng.IntN(len(list))] }

func (m *modelTest) pick() *member { return m.members[oneOf(m, m.ids())] }

func (m *modelTest) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatalf("step %d: %v", m.step, err)
	}
}

func (m *modelTest) addAccount() {
	m.names++
	a, err := m.st.AddAccount(m.t.Context(), fmt.Sprint("p", m.names))
	m.must(err)
	m.members[a.ID] = &member{Account: a, own: map[nixproto.StorePath]*content{}, links: map[store.AccountID]bool{}, share: true,
		trusts: map[string]bool{}, offers: map[string]bool{}, policy: askPolicy{reuse: "all", failures: true}}
	m.saveWishes(m.members[a.ID])
	for _, p := range m.inputs {
		if !m.chance(4) {
			m.bring(m.members[a.ID], p, &content{by: map[string]bool{}}, 0)
		}
	}
}

// removeAccount removes an account, and another one comes.
func (m *modelTest) removeAccount() {
	a := m.pick()
	m.must(m.st.RemoveAccount(m.t.Context(), a.ID))
	delete(m.members, a.ID)
	m.addAccount()
}

// allPaths are those that can be in views.
func (m *modelTest) allPaths() []nixproto.StorePath {
	all := slices.Clone(m.inputs)
	for _, d := range m.drvs {
		all = slices.AppendSeq(all, maps.Values(d.outs))
	}
	slices.Sort(all)
	return all
}

// allKeys are the names of all keys that may sign.
func (m *modelTest) allKeys() (names []string) {
	names = slices.Sorted(maps.Keys(m.foreign))
	for _, id := range m.ids() {
		names = append(names, keyName(m.members[id].PublicKey))
	}
	return names
}

// wish changes what an account wants.
func (m *modelTest) wish() {
	a := m.pick()
	switch m.rng.IntN(8) {
	case 0, 1:
		b := m.pick().ID
		a.links[b] = !a.links[b]
	case 2:
		k := oneOf(m, m.allKeys())
		a.trusts[k] = !a.trusts[k]
	case 3:
		k := oneOf(m, m.allKeys())
		a.offers[k] = !a.offers[k]
	case 4, 5:
		a.share = !a.share
	case 6:
		a.noHours = !a.noHours
	default:
		a.policy = askPolicy{reuse: oneOf(m, []string{"all", "all", "own", "none"}), failures: m.chance(2), timeouts: m.chance(2)}
	}
	m.saveWishes(a)
}

// saveWishes makes settings of what an account wants.
func (m *modelTest) saveWishes(a *member) {
	list := func(set map[string]bool, spell func(string) string) string {
		var all []string
		for _, k := range slices.Sorted(maps.Keys(set)) {
			if text := spell(k); set[k] && text != "" {
				all = append(all, text)
			}
		}
		return strings.Join(all, ",")
	}
	links := map[string]bool{}
	for id, yes := range a.links {
		if b := m.members[id]; b != nil {
			links[b.Name] = yes
		}
	}
	same := func(k string) string { return k }
	values := map[string]string{
		"trusted-accounts":     list(links, same),
		"offer-signed":         list(a.offers, same),
		"trusted-public-keys":  list(a.trusts, m.public),
		"share-results":        fmt.Sprint(a.share),
		"reuse-results":        a.policy.reuse,
		"reuse-build-failures": fmt.Sprint(a.policy.failures),
		"reuse-build-timeouts": fmt.Sprint(a.policy.timeouts),
	}
	if a.noHours {
		values["max-cpu-hours-per-month"] = "0"
	}
	m.must(m.st.ChangeSettings(m.t.Context(), []store.SettingsOwner{{Account: a.ID}}, func(now []map[string]string) error {
		clear(now[0])
		maps.Copy(now[0], values)
		return nil
	}))
}

// public is the public key of that name, "" if nobody has it any more.
func (m *modelTest) public(name string) string {
	if k, ok := m.foreign[name]; ok {
		return k.Public().String()
	}
	for _, a := range m.members {
		if keyName(a.PublicKey) == name {
			return a.PublicKey
		}
	}
	return ""
}

func (m *modelTest) signingKey(name string) (nixproto.SigningKey, error) {
	if k, ok := m.foreign[name]; ok {
		return k, nil
	}
	for _, a := range m.members {
		if keyName(a.PublicKey) == name {
			return m.st.SigningKey(m.t.Context(), a.ID)
		}
	}
	return nixproto.SigningKey{}, store.ErrNotFound
}

// sight is what a session of the account would have.
func (m *modelTest) sight(a *member) *store.Sight {
	return m.st.NewSight(a.ID, m.trusts.trust(a.ID, m.book.account(a.ID).TrustedPublicKeys))
}

// upload brings a path with some content, for which its name says nothing.
func (m *modelTest) upload() {
	a := m.pick()
	all := m.allPaths()
	p := oneOf(m, all)
	if m.chance(2) {
		p = oneOf(m, m.inputs)
	}
	if d := m.drvs[3]; p == d.outs["out"] {
		return // it says what it has to be
	}
	c := &content{by: map[string]bool{}}
	for _, r := range m.inputs[:max(0, slices.Index(m.inputs, p))] {
		if m.chance(3) {
			c.refs = append(c.refs, r)
		}
	}
	slices.Sort(c.refs)
	for _, name := range m.allKeys() {
		c.by[name] = m.chance(5)
	}
	m.bring(a, p, c, m.rng.IntN(4)/3)
}

// bring uploads one of two contents, with references and signatures.
func (m *modelTest) bring(a *member, p nixproto.StorePath, c *content, which int) {
	m.t.Helper()
	nar := storetest.File(fmt.Sprint("content ", which, c.refs), false)
	c.hash = nixproto.SumSHA256(nar)
	info := &nixproto.PathInfo{Path: p, NarHash: c.hash, NarSize: uint64(len(nar)), References: c.refs}
	for name, yes := range c.by {
		if yes {
			k, err := m.signingKey(name)
			m.must(err)
			info.Sign(k)
		}
	}
	refused := slices.ContainsFunc(c.refs, func(r nixproto.StorePath) bool { return m.usable(a, r) == nil })
	u, err := m.sight(a).NewUpload(m.t.Context(), store.UploadOptions{})
	m.must(err)
	defer u.Abort()
	if err := u.Add(info, bytes.NewReader(nar)); refused != errors.Is(err, store.ErrInvalid) || !refused && err != nil {
		m.t.Errorf("upload of %s: %v, refused by the rules: %v", p, err, refused)
	}
	if refused {
		return
	}
	m.must(u.Commit())
	m.enter(a, p, c)
}

// sign adds a signature to a path of an own view.
func (m *modelTest) sign() {
	a, name := m.pick(), oneOf(m, m.allKeys())
	p := oneOf(m, m.allPaths())
	c := a.own[p]
	if c == nil {
		return
	}
	k, err := m.signingKey(name)
	m.must(err)
	info, err := m.st.Info(m.t.Context(), a.ID, p)
	m.must(err)
	m.must(m.st.AddSignatures(m.t.Context(), a.ID, p, []string{k.Sign(info.Fingerprint())}))
	signed := &content{c.hash, c.refs, maps.Clone(c.by)}
	signed.by[name] = true
	a.own[p] = signed
}

// delete deletes a path from an own view, where nothing refers to it.
func (m *modelTest) delete() {
	a := m.pick()
	all := slices.Sorted(maps.Keys(a.own))
	if len(all) == 0 {
		return
	}
	p := oneOf(m, all)
	used := false
	for q, c := range a.own {
		used = used || q != p && slices.Contains(c.refs, p)
	}
	if _, err := m.st.Delete(m.t.Context(), a.ID, p); used != errors.Is(err, store.ErrInUse) || !used && err != nil {
		m.t.Errorf("delete %s of %s: %v, in use: %v", p, a.Name, err, used)
		return
	}
	if !used {
		delete(a.own, p)
	}
}

func (m *modelTest) sweep() {
	_, err := m.st.Sweep(m.t.Context())
	m.must(err)
	m.world.sweep()
}

// restart ends the server when nothing runs, and starts it again.
func (m *modelTest) restart() {
	m.sweep() // what a start removes is not what is tested here
	m.close()
	m.open(m.dir)
}

// newGeneration makes builds run in another sandbox: earlier failures are void.
func (m *modelTest) newGeneration() {
	m.generation = fmt.Sprint("fake ", m.rng.IntN(2))
	m.runner.mu.Lock()
	m.runner.generation = m.generation
	m.runner.mu.Unlock()
}

// revoke takes out what is stored under a key.
func (m *modelTest) revoke() {
	builds := map[store.BuildID]string{}
	for s, e := range m.ends {
		if e.success != nil {
			builds[e.success.build] = s.key
		}
	}
	if len(builds) == 0 {
		return
	}
	id := oneOf(m, slices.Sorted(maps.Keys(builds)))
	_, _, err := m.Revoke(m.t.Context(), fmt.Sprint(id))
	m.must(err)
	maps.DeleteFunc(m.ends, func(s slot, _ *knownEnds) bool { return s.key == builds[id] })
}
