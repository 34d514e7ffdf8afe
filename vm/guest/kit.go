package guest

import (
	"errors"
	"os"
	"runtime"

	"nbd/vm/link"
)

// A kit is what a build needs and what can be made before it is known, so that
// a template has it and a clone need not make it: under emulation each thing
// that is done for the first time after a restore has to be translated anew.
type kit struct {
	disks   map[string]string // device files by serial; none is open
	shell   string            // the program that becomes /bin/sh, "" for none
	stage   *stage            // on the scratch disk, which is mounted
	group   *cgroup
	sandbox *sandbox
}

func newKit() (*kit, error) {
	k := &kit{disks: map[string]string{}, shell: link.ShellPath}
	for _, serial := range []string{link.InputSerial, link.ScratchSerial, link.OutputSerial} {
		dev, err := findDisk(serial)
		if err != nil {
			return nil, err
		}
		k.disks[serial] = dev
	}
	if _, err := os.Stat(k.shell); errors.Is(err, os.ErrNotExist) {
		k.shell = ""
	} else if err != nil {
		return nil, err
	}
	if err := k.mountScratch(); err != nil {
		return nil, err
	}
	var err error
	if k.stage, err = newStage(scratchDir, k.shell); err != nil {
		return nil, err
	}
	if k.group, err = newCgroup(cgroupRoot); err != nil {
		return nil, err
	}
	if k.sandbox, err = newSandbox(k.group, k.stage); err != nil {
		return nil, err
	}
	if err := errors.Join(link.Warm(), warmPlan()); err != nil {
		return nil, err
	}
	// So that no clone has to collect soon.
	runtime.GC()
	return k, nil
}
