package vm

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestArgumentsOfAArch64(t *testing.T) {
	for _, tt := range []struct {
		accel      string
		want, lack []string
	}{
		{"tcg", []string{"-M virt,gic-version=max,memory-backend=mem0", "-cpu neoverse-n1", "console=ttyAMA0", "mitigations=off"},
			[]string{"q35", "vmgenid", "ttyS0", "no_timer_check", "tsc"}},
		{"kvm", []string{"-accel kvm", "-cpu host ", "console=ttyAMA0"}, []string{"migratable", "mitigations"}},
	} {
		line := strings.Join(arguments(machine{arch: archAArch64, accel: tt.accel, vcpus: 2, memoryMiB: 2560}, modeBoot), " ")
		for _, w := range tt.want {
			if !strings.Contains(line, w) {
				t.Errorf("%s: %q is not in %s", tt.accel, w, line)
			}
		}
		for _, l := range tt.lack {
			if strings.Contains(line, l) {
				t.Errorf("%s: %q is in %s", tt.accel, l, line)
			}
		}
	}
}

// testRunnerOf returns a Runner of an x86-64 machine that boots nothing.
func testRunnerOf(cfg Config, found *platform) *Runner {
	b := &base{arch: archX8664, native: true, qemu: qemu{Version: "7"}, kernel: Kernel{Name: "6.1"}, finding: newLock()}
	if found != nil {
		b.found.Store(found)
	}
	r := &Runner{cfg: cfg, native: b}
	r.setup.Store(&setup{[]*base{b}, map[*arch]lack{archAArch64: {
		errors.Join(&MissingError{"no kernel", "import one"}, &MissingError{"no shell", "import that"}), cfg.seen(archAArch64),
	}}})
	return r
}

func TestSystems(t *testing.T) {
	offered := func(r *Runner) (list []string) {
		for _, s := range r.Systems() {
			if (r.baseOf(s.Name) != nil) != s.Offered || s.Offered != (s.WhyNot == "") {
				t.Errorf("%+v", s)
			}
			if s.Offered {
				list = append(list, s.Name)
			} else {
				list = append(list, s.Name+": "+s.WhyNot)
			}
		}
		return list
	}
	whole := testRunnerOf(Config{}, nil)
	whole.setup.Store(&setup{bases: []*base{whole.native, {arch: archAArch64}}})
	broken := testRunnerOf(Config{}, nil)
	bad := &base{arch: archAArch64}
	bad.broken.Store(&breakage{why: errors.New("it hangs")})
	broken.setup.Store(&setup{bases: []*base{broken.native, bad}})
	for _, tt := range []struct {
		name string
		r    *Runner
		want []string
	}{
		{"not set up", testRunnerOf(Config{}, nil),
			[]string{"x86_64-linux", "i686-linux", "aarch64-linux: it is not set up: no kernel (import one); no shell (import that)"}},
		{"all", whole, []string{"x86_64-linux", "i686-linux", "aarch64-linux"}},
		{"broken", broken, []string{"x86_64-linux", "i686-linux", "aarch64-linux: it hangs"}},
		{"switched off", testRunnerOf(Config{Systems: []string{"i686-linux"}}, nil),
			[]string{"x86_64-linux: it is switched off (--systems)", "i686-linux", "aarch64-linux: it is switched off (--systems)"}},
	} {
		if diff := cmp.Diff(tt.want, offered(tt.r)); diff != "" {
			t.Errorf("%s: %s", tt.name, diff)
		}
	}
	if arm := whole.Systems()[2]; arm.Accel != "tcg" || !strings.Contains(arm.WhyNotKVM, "x86_64 and not aarch64") {
		t.Errorf("%+v", arm)
	}
	if whole.baseOf("builtin") != whole.native || whole.baseOf("riscv64-linux") != nil {
		t.Error("wrong base for a system without one of its own")
	}
}

func TestFeatures(t *testing.T) {
	found := func(a *answer, noNested string) *platform {
		p := &platform{arch: archX8664, accel: "kvm", noNested: noNested}
		if a != nil {
			p.nested.Store(a)
		}
		return p
	}
	day := time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		name string
		r    *Runner
		want Feature
	}{
		{"before the first boot", testRunnerOf(Config{}, nil), Feature{WhyNot: "not known yet", Unknown: true}},
		{"while it is tried", testRunnerOf(Config{}, found(nil, "")), Feature{WhyNot: "not known yet", Unknown: true}},
		{"works", testRunnerOf(Config{}, found(&answer{Works: true}, "")), Feature{Offered: true}},
		{"does not work", testRunnerOf(Config{}, found(&answer{Reason: "no SVM", When: day}, "")), Feature{WhyNot: "tried on 2026-01-02: no SVM"}},
		{"not tried", testRunnerOf(Config{}, found(nil, "emulated")), Feature{WhyNot: "emulated"}},
		{"off", testRunnerOf(Config{KVMInBuilds: nestedOff}, found(&answer{Works: true}, "")), Feature{WhyNot: "--kvm-in-builds", SwitchedOff: true}},
	} {
		features := tt.r.Features()
		if len(features) != 3 || features[1].Name != "nixos-test" || features[1].Offered != features[0].Offered || features[2].Name != "uid-range" || features[2].Offered {
			t.Errorf("%s: %+v", tt.name, features)
		}
		got := features[0]
		if !strings.Contains(got.WhyNot, tt.want.WhyNot) || got.Offered != (got.WhyNot == "") {
			t.Errorf("%s: %+v", tt.name, got)
		}
		tt.want.Name, tt.want.WhyNot = "kvm", got.WhyNot
		if got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

// Which guests are asked whether they can run guests.
func TestWhyNotNested(t *testing.T) {
	for _, tt := range []struct {
		mode, accel string
		arch        *arch
		tried       bool
	}{
		{"", "kvm", archX8664, true},
		{"", "tcg", archX8664, false},
		{nestedEmulated, "tcg", archX8664, true},
		{nestedEmulated, "kvm", archX8664, true},
		{nestedOff, "kvm", archX8664, false},
		{nestedEmulated, "kvm", archAArch64, false},
	} {
		r := testRunnerOf(Config{KVMInBuilds: tt.mode}, nil)
		if why := r.whyNotNested(&platform{arch: tt.arch, accel: tt.accel}); (why == "") != tt.tried {
			t.Errorf("%+v: %q", tt, why)
		}
	}
}

func TestConfigOfSystems(t *testing.T) {
	other := arches[slices.IndexFunc(arches, func(a *arch) bool { return a.name != hostArchName() })]
	for _, tt := range []struct {
		cfg  Config
		want string
	}{
		{Config{Systems: []string{"vax-linux"}}, "no guests for the system"},
		{Config{Systems: []string{other.systems[0]}, Accel: "kvm"}, "not to be emulated"},
		{Config{KVMInBuilds: "yes"}, "auto, emulated and off"},
	} {
		tt.cfg.StateDir = t.TempDir()
		if _, err := New(tt.cfg); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("got %v, want %q", err, tt.want)
		}
	}
}

// What this program was built with is a program for that architecture; built
// without, it says how to get there.
func TestAgent(t *testing.T) {
	for _, a := range arches {
		if a.name == hostArchName() {
			continue
		}
		var missing *MissingError
		if err := checkAgent(a); errors.As(err, &missing) {
			if !strings.Contains(missing.Hint, "contrib/agents") {
				t.Error(missing)
			}
			continue
		}
		path, err := unpackAgent(t.TempDir(), a)
		if err != nil {
			t.Fatal(err)
		}
		if of, err := archOfProgram(path); err != nil || of != a {
			t.Errorf("%s: %v, %v", a.name, of, err)
		}
	}
}

func TestArches(t *testing.T) {
	for _, a := range arches {
		for _, s := range a.systems {
			if archOf(s) != a {
				t.Errorf("%s is not of %s", s, a.name)
			}
		}
		if archOfELF(a.elf) != a {
			t.Errorf("programs of %s", a.name)
		}
		if slices.ContainsFunc(arches, func(b *arch) bool { return a != b && (b.named(a.goarch) || b.named(a.name)) }) {
			t.Errorf("releases of %s", a.name)
		}
	}
	if archOf("builtin") != nil || archOfELF(0) != nil {
		t.Error("an architecture for nothing")
	}
}

func TestParseCPUName(t *testing.T) {
	for text, want := range map[string]string{
		"processor\t: 0\nmodel\t\t: 1\nmodel name\t: AMD EPYC\nstepping\t: 1\n":                                   "AMD EPYC",
		"processor\t: 0\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\n\n": "0x41 0xd0c 0x3",
		"": "",
	} {
		if got := parseCPUName(text); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
