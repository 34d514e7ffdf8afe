package vm

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestArguments(t *testing.T) {
	tcg := machine{arch: archX8664, accel: "tcg", vcpus: 2, memoryMiB: 2560, tscKHz: 2445430}
	kvm := machine{arch: archX8664, accel: "kvm", vcpus: 8, memoryMiB: 40960}
	for _, tt := range []struct {
		name       string
		m          machine
		how        mode
		want, lack []string
	}{
		{
			name: "template", m: tcg, how: modeBoot,
			want: []string{"-smp 2", "-m 2560M", "-cpu max", "-accel tcg,thread=multi,tb-size=128",
				"size=2560M,mem-path=/proc/self/fd/3,share=on,reserve=off", "tsc_early_khz=2445430", "no_timer_check"},
			lack: []string{"-incoming"},
		},
		{
			name: "clone", m: tcg, how: modeClone,
			want: []string{"share=on,reserve=off", "-incoming defer", "tsc_early_khz=2445430"},
		},
		{
			name: "unknown frequency", m: machine{arch: archX8664, accel: "tcg", vcpus: 2, memoryMiB: 2560},
			lack: []string{"tsc_early_khz"},
		},
		{
			name: "hardware", m: kvm, how: modeBoot,
			want: []string{"-accel kvm", "-cpu host,migratable=on", "-smp 8", "-m 40960M"},
			lack: []string{"tcg", "tsc_early_khz", "mitigations=off", "nokaslr", "no_timer_check", "maxcpus"},
		},
		{
			name: "on demand", m: machine{arch: archX8664, accel: "kvm", vcpus: 8, memoryMiB: 2560, onDemand: true}, how: modeClone,
			want: []string{"-smp 8", "maxcpus=1"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			line := strings.Join(arguments(tt.m, tt.how), " ")
			for _, w := range tt.want {
				if !strings.Contains(line, w) {
					t.Errorf("%q is not in %s", w, line)
				}
			}
			for _, l := range tt.lack {
				if strings.Contains(line, l) {
					t.Errorf("%q is in %s", l, line)
				}
			}
		})
	}
}

// Every guest, whatever its size, has QEMU's own sandbox, no network and
// nothing of the host's folders.
func TestArgumentsAreConfined(t *testing.T) {
	for _, accel := range []string{"tcg", "kvm"} {
		for _, how := range []mode{modeBoot, modeClone} {
			args := arguments(machine{arch: archX8664, accel: accel, vcpus: 2, memoryMiB: 2560}, how)
			if i := slices.Index(args, "-sandbox"); i < 0 || args[i+1] != "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny" {
				t.Errorf("%s: no sandbox in %q", accel, args)
			}
			for _, need := range []string{"-nodefaults", "-no-user-config", "-no-reboot"} {
				if !slices.Contains(args, need) {
					t.Errorf("%s: no %s", accel, need)
				}
			}
			for _, a := range args {
				for _, bad := range []string{"net", "/tmp", "/var", "balloon", "/dev/"} {
					if strings.Contains(a, bad) {
						t.Errorf("%s: %q in argument %q", accel, bad, a)
					}
				}
			}
		}
	}
}

// Clones differ from their template in nothing but what makes them clones.
func TestCloneMatchesTemplate(t *testing.T) {
	m := machine{arch: archX8664, accel: "tcg", vcpus: 2, memoryMiB: 2560}
	boot, clone := arguments(m, modeBoot), arguments(m, modeClone)
	if len(clone) != len(boot)+2 {
		t.Fatalf("%d and %d arguments", len(boot), len(clone))
	}
	for i, a := range boot {
		if a != clone[i] {
			t.Errorf("%q and %q", a, clone[i])
		}
	}
}

func TestMachineFor(t *testing.T) {
	p := &platform{arch: archX8664, accel: "tcg", tscKHz: 2000000}
	for _, tt := range []struct {
		cores, memory, scratch int
		want                   machine
		err                    string
	}{
		{cores: 1, memory: 512, want: machine{arch: archX8664, accel: "tcg", vcpus: 1, memoryMiB: 2560, scratchGiB: 64, tscKHz: 2000000}},
		{cores: 2, memory: 2048, scratch: 3000, want: machine{arch: archX8664, accel: "tcg", vcpus: 2, memoryMiB: 2560, scratchGiB: 4, tscKHz: 2000000}},
		{cores: 3, memory: 4096, want: machine{arch: archX8664, accel: "tcg", vcpus: 4, memoryMiB: 4608, scratchGiB: 64, tscKHz: 2000000}},
		{cores: 128, memory: 100000, want: machine{arch: archX8664, accel: "tcg", vcpus: 128, memoryMiB: 131584, scratchGiB: 64, tscKHz: 2000000}},
		{cores: 129, memory: 512, err: "at most 128 processors"},
		{cores: 1, memory: 1 << 20, err: "at most 131392 MiB"},
		{cores: 1, memory: 512, scratch: MaxScratchMiB + 1, err: "scratch disk"},
	} {
		got, err := p.machineFor(&Spec{Cores: tt.cores, MemoryMiB: tt.memory, ScratchMiB: tt.scratch})
		var bad *SpecError
		switch {
		case tt.err != "":
			if !errors.As(err, &bad) || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%d, %d: %v, want %q", tt.cores, tt.memory, err, tt.err)
			}
		case err != nil || got != tt.want:
			t.Errorf("%d, %d: %v, %v; want %v", tt.cores, tt.memory, got, err, tt.want)
		}
	}
}

// With hardware, one template serves many numbers of processors.
func TestMachineOnDemand(t *testing.T) {
	p := &platform{arch: archX8664, accel: "kvm", onDemand: true}
	for cores, want := range map[int]int{1: 8, 2: 8, 8: 8, 9: 32, 128: 128} {
		m, err := p.machineFor(&Spec{Cores: cores, MemoryMiB: 2048})
		if err != nil || m.vcpus != want || !m.onDemand {
			t.Errorf("%d: %+v, %v", cores, m, err)
		}
	}
}
