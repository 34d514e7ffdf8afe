package main

import "golang.org/x/sys/unix"

func stackPointer(r *unix.PtraceRegs) uintptr { return uintptr(r.Esp) }
