// What access.cpp offers to the scheduler.
#pragma once

void prepare_accesses();  // to be called before every launch
