package server

import (
	"strings"
	"testing"

	"nbd/nixproto"
)

// TestOffered has requests for what guests could have, and have not: each is
// refused in a sentence of its own, which tells nothing of the host.
func TestOffered(t *testing.T) {
	for _, tt := range []struct {
		name, system, feature string
		runner                *fakeRunner // what is different
		want                  string      // "" if it is built
	}{
		{name: "not set up", system: "aarch64-linux", want: "which is not set up on this server (`nbd doctor`, run there, says how), and this server builds for i686-linux, x86_64-linux"},
		{name: "off", system: "aarch64-linux", runner: &fakeRunner{noAArch64: true}, want: "which is switched off on this server, and"},
		{name: "unheard of", system: "riscv64-linux", want: "'riscv64-linux', and this server builds for"},
		{name: "no kvm", feature: "kvm", want: "which the guests of this server do not have"},
		{name: "no kvm, found out", feature: "kvm", runner: &fakeRunner{unknown: true}, want: "which the guests of this server do not have"},
		{name: "kvm", feature: "kvm", runner: &fakeRunner{nested: true}},
		{name: "kvm, found out", feature: "kvm", runner: &fakeRunner{nested: true, unknown: true}},
		{name: "unheard of", feature: "gone", want: "'gone', and this server offers benchmark, big-parallel, ca-derivations"},
	} {
		t.Run(tt.name+" "+tt.system+tt.feature, func(t *testing.T) {
			bt := newBuildTest(t, nil)
			if r := tt.runner; r != nil {
				bt.runner.noAArch64, bt.runner.nested, bt.runner.unknown = r.noAArch64, r.nested, r.unknown
			}
			d := drv("x")
			if tt.system != "" {
				d.System = tt.system
			}
			if tt.feature != "" {
				d.Env["requiredSystemFeatures"] = tt.feature
			}
			result, _ := bt.build(bt.request(d))
			if tt.want == "" {
				if result.Status != nixproto.Built {
					t.Errorf("got %+v", result)
				}
				return
			}
			if result.Status != nixproto.InputRejected || !strings.Contains(result.Error, tt.want) || strings.Contains(result.Error, "/host") || strings.Contains(result.Error, "/dev/kvm") {
				t.Errorf("got %+v, want %q", result, tt.want)
			}
			if bt.runner.count("x") != 0 {
				t.Error("it ran")
			}
		})
	}
}
